// The layout and the arithmetic of hrpo_gate_decode.cu, which a CPU compiles too: so they are tested where there is no
// GPU. The specification is kernels/fastlatent_kernels/hrpo_gate/__init__.py.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define FASTLATENT_TILE __host__ __device__ __forceinline__
#else
#define FASTLATENT_TILE inline
#endif

namespace fastlatent {

constexpr int kTileWarps = 8;     // warps of a block, which share the sum over k
constexpr int kTileColumns = 16;  // output columns of a block: M of mma.m16n8k16, whose A is the weight
constexpr int kTileRows = 8;      // rows of one product: its N
constexpr int kTileDepth = 32;    // k of one step of a warp: two products, 8 consecutive k and so 16 bytes a lane

// Where a lane's 16 bytes begin. The k that mma numbers 2m, 2m + 1, 2m + 8, 2m + 9 in the first product and in the
// second are the 8 consecutive ones of lane member m: a sum over k may take them in any order, if A and B agree.
FASTLATENT_TILE int64_t lane_k(int64_t step, int lane) { return step * kTileDepth + lane % 4 * 8; }
FASTLATENT_TILE int lane_column(int lane, int half) { return lane / 4 + half * 8; }
FASTLATENT_TILE int lane_row(int lane) { return lane / 4; }

// What accumulator i (0..3) of a lane is the sum for.
FASTLATENT_TILE int sum_column(int lane, int i) { return lane / 4 + i / 2 * 8; }
FASTLATENT_TILE int sum_row(int lane, int i) { return lane % 4 * 2 + i % 2; }

FASTLATENT_TILE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// The gate of one element; u_r and u_i carry their bias.
FASTLATENT_TILE float gated(float u_r, float u_i, float lambda, float token, float mixture, float compat_eps) {
  const float softplus = (lambda < 0.0f ? -lambda : 0.0f) + log1pf(expf(-fabsf(lambda)));
  const float log_a = -8.0f * softplus * sigmoid(u_r);
  // the reference's limit: what is left of 1 - a^2 there is subnormal
  const float rest = log_a > -1.17549435e-38f ? 0.0f : -expm1f(2.0f * log_a);
  return expf(log_a) * token + sqrtf(rest + compat_eps) * (sigmoid(u_i) * mixture);
}

}  // namespace fastlatent
