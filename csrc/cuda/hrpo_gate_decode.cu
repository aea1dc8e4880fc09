// hrpo_gate_decode: a block owns 16 output columns of up to 64 rows, reads both of their gate matrices once, 16 bytes a
// lane straight into the tensor cores' registers, and never stores the pre-activations.
// Compiled, never run: there was no GPU when it was written.
#include "hrpo_gate_decode.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <initializer_list>

#include "device.h"
#include "gate_tile.h"

namespace fastlatent {
namespace {

constexpr int kThreads = 32 * kTileWarps;

__device__ uint4 load8(const __nv_bfloat16* from) { return __ldg(reinterpret_cast<const uint4*>(from)); }

// sum += A B for A [16, 16] and B [16, 8]; PTX ISA, "Matrix fragments for mma.m16n8k16"
__device__ void multiply(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ bool is_known(int64_t id, int64_t vocab) { return id >= 0 && id < vocab; }

// This warp's share of the sums over k of both gate matrices; rows that are not latent count as 0.
template <int kGroups>
__device__ void sum_share(const HrpoGateDecode& args, int64_t first_row, int64_t first_column,
                          float (&sum)[2][kGroups][4]) {
  const int lane = threadIdx.x % 32;
  const __nv_bfloat16 *table = static_cast<const __nv_bfloat16*>(args.table), *token[kGroups];
#pragma unroll
  for (int j = 0; j < kGroups; j++) {
    const int64_t row = first_row + j * kTileRows + lane_row(lane);
    token[j] = nullptr;
    if (row < args.rows && args.latent[row] && is_known(args.token_ids[row], args.vocab))
      token[j] = table + args.token_ids[row] * args.width;
  }
  const __nv_bfloat16* weight = static_cast<const __nv_bfloat16*>(args.weight);
  for (int64_t step = threadIdx.x / 32; step < args.width / kTileDepth; step += kTileWarps) {
    const int64_t k = lane_k(step, lane);
    uint4 w[2][2];
#pragma unroll
    for (int gate = 0; gate < 2; gate++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        w[gate][half] = load8(weight + (gate * args.width + first_column + lane_column(lane, half)) * args.width + k);
#pragma unroll
    for (int j = 0; j < kGroups; j++) {
      const uint4 x = token[j] ? load8(token[j] + k) : uint4{0, 0, 0, 0};
#pragma unroll
      for (int gate = 0; gate < 2; gate++) {
        multiply(sum[gate][j], w[gate][0].x, w[gate][1].x, w[gate][0].y, w[gate][1].y, x.x, x.y);
        multiply(sum[gate][j], w[gate][0].z, w[gate][1].z, w[gate][0].w, w[gate][1].w, x.z, x.w);
      }
    }
  }
}

template <int kGroups>
__global__ void __launch_bounds__(kThreads) decode(HrpoGateDecode args) {
  constexpr int kRows = kGroups * kTileRows, kElements = kRows * kTileColumns;
  constexpr int kStride = kTileColumns + 1;  // odd: fewer lanes meet in one bank
  constexpr int kOwn = (kElements + kThreads - 1) / kThreads;
  __shared__ float share[kTileWarps][kRows * kStride];

  const int64_t first_column = (int64_t)blockIdx.x * kTileColumns, first_row = (int64_t)blockIdx.y * kRows;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t watched = first_row + threadIdx.x;
  float u[2][kOwn] = {};
  // rows that all read plain tokens need no product
  if (__syncthreads_or(threadIdx.x < kRows && watched < args.rows && args.latent[watched])) {
    float sum[2][kGroups][4] = {};
    sum_share<kGroups>(args, first_row, first_column, sum);
#pragma unroll
    for (int gate = 0; gate < 2; gate++) {
      // the two matrices take turns in the same shared memory; warps are added in their order, so results repeat
      __syncthreads();
#pragma unroll
      for (int j = 0; j < kGroups; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          share[warp][(j * kTileRows + sum_row(lane, i)) * kStride + sum_column(lane, i)] = sum[gate][j][i];
      __syncthreads();
#pragma unroll
      for (int n = 0; n < kOwn; n++) {
        const int element = n * kThreads + threadIdx.x;
        if (element >= kElements) continue;
        for (int from = 0; from < kTileWarps; from++)
          u[gate][n] += share[from][element / kTileColumns * kStride + element % kTileColumns];
      }
    }
  }

#pragma unroll
  for (int n = 0; n < kOwn; n++) {
    const int element = n * kThreads + threadIdx.x;
    const int64_t row = first_row + element / kTileColumns, column = first_column + element % kTileColumns;
    if (element >= kElements || row >= args.rows) continue;
    const int64_t id = args.token_ids[row], at = row * args.width + column;
    __nv_bfloat16* out = static_cast<__nv_bfloat16*>(args.out);
    float value = __int_as_float(0x7fffffff);  // NaN: the only way to tell the caller of an id outside the table
    if (is_known(id, args.vocab)) {
      value = __bfloat162float(static_cast<const __nv_bfloat16*>(args.table)[id * args.width + column]);
      if (args.latent[row])
        value = gated(u[0][n] + args.bias[column], u[1][n] + args.bias[args.width + column], args.lambda[column], value,
                      __bfloat162float(static_cast<const __nv_bfloat16*>(args.mixture)[at]), args.compat_eps);
    }
    out[at] = __float2bfloat16_rn(value);
  }
}

template <int kGroups>
void start(const HrpoGateDecode& args, cudaStream_t stream) {
  constexpr int kRows = kGroups * kTileRows;
  const dim3 blocks((unsigned)(args.width / kTileColumns), (unsigned)((args.rows + kRows - 1) / kRows));
  decode<kGroups><<<blocks, kThreads, 0, stream>>>(args);
}

}  // namespace

const char* hrpo_gate_decode(const HrpoGateDecode& args, void* stream, int device) {
  if (args.width % kTileDepth) return "width: expected a multiple of 32";
  for (const void* pointer : {args.table, args.weight})
    if (reinterpret_cast<uintptr_t>(pointer) % 16) return "table, weight: expected addresses that are multiples of 16";
  if (args.rows == 0) return nullptr;
  const OnDevice on_device(device);
  if (const cudaError_t error = on_device.error()) return cudaGetErrorString(error);
  if (args.rows <= kTileRows) start<1>(args, (cudaStream_t)stream);
  else if (args.rows <= 2 * kTileRows) start<2>(args, (cudaStream_t)stream);
  else if (args.rows <= 4 * kTileRows) start<4>(args, (cudaStream_t)stream);
  else start<8>(args, (cudaStream_t)stream);
  const cudaError_t error = cudaGetLastError();
  return error ? cudaGetErrorString(error) : nullptr;
}

}  // namespace fastlatent
