// gaussian_reparam: a warp per position reads mean and log-variance once, 16 bytes a lane, and sums by shuffles.
// Compiled, never run: there was no GPU when it was written.
#include "gaussian_reparam.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <initializer_list>

#include "device.h"
#include "gaussian_math.h"

namespace fastlatent {
namespace {

constexpr int kWarps = 4;  // positions in a block

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

__device__ float as_float(float x) { return x; }
__device__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ T rounded(float x);
template <>
__device__ float rounded<float>(float x) { return x; }
template <>
__device__ __nv_bfloat16 rounded<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

template <class T, int N>
__device__ Pack<T, N> load(const void* base, int64_t element) {
  return *reinterpret_cast<const Pack<T, N>*>(static_cast<const T*>(base) + element);
}

template <class T, int N>
__device__ void store(void* base, int64_t element, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(static_cast<T*>(base) + element) = pack;
}

__device__ float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
  return x;
}

// The position of this warp, and its noise.
template <Source kSource>
struct Row {
  int64_t index;
  LatentNoise noise;

  __device__ explicit Row(const GaussianInputs& in, int64_t index)
      : index(index),
        noise(kSource == Source::kNoise ? LatentNoise(*in.seed, in.counter + 3 * index) : LatentNoise()) {}

  // z as it is rounded when stored, and eps; a given z has no eps
  template <class T>
  __device__ float draw(const Posterior& q, T given, int64_t dimension, float* eps) const {
    if (kSource == Source::kZ) {
      *eps = 0.0f;
      return as_float(given);
    }
    *eps = kSource == Source::kEps ? as_float(given) : inverse_normal(noise.uniform((uint32_t)dimension));
    return as_float(rounded<T>(q.mean + q.sigma * *eps));
  }
};

template <class T, int N, Source kSource>
__global__ void __launch_bounds__(32 * kWarps) forward(GaussianForward args) {
  const int64_t index = (int64_t)blockIdx.x * kWarps + threadIdx.x / 32;
  if (index >= args.rows) return;  // whole warps: the shuffles below are complete
  const Row<kSource> row(args, index);
  RowSums sums;
  for (int64_t d = threadIdx.x % 32 * N; d < args.width; d += 32 * N) {
    const int64_t at = index * args.width + d;
    const Pack<T, N> mean = load<T, N>(args.mean, at), logvar = load<T, N>(args.logvar, at);
    Pack<T, N> given{}, drawn;
    if (kSource != Source::kNoise) given = load<T, N>(args.given, at);
#pragma unroll
    for (int i = 0; i < N; i++) {
      const Posterior q(as_float(mean.at[i]), as_float(logvar.at[i]));
      float eps;
      const float z = row.draw(q, given.at[i], d + i, &eps);
      drawn.at[i] = rounded<T>(z);
      sums.add(q, z, args.free_bits);
    }
    if (kSource != Source::kZ) store(args.z, at, drawn);
  }
  const float kl = warp_sum(sums.kl), square = warp_sum(sums.square), variance = warp_sum(sums.variance);
  if (threadIdx.x % 32 == 0) {
    args.kl[index] = kl;
    args.logprob[index] = -0.5f * square;
    args.variance[index] = variance / (float)args.width;
  }
}

template <class T, int N, Source kSource>
__global__ void __launch_bounds__(32 * kWarps) backward(GaussianBackward args) {
  const int64_t index = (int64_t)blockIdx.x * kWarps + threadIdx.x / 32;
  if (index >= args.rows) return;
  const Row<kSource> row(args, index);
  RowGradients g;
  if (args.g_kl) g.kl = args.g_kl[index];
  if (args.g_logprob) g.logprob = args.g_logprob[index];
  if (args.g_variance) g.variance = args.g_variance[index] / (float)args.width;
  for (int64_t d = threadIdx.x % 32 * N; d < args.width; d += 32 * N) {
    const int64_t at = index * args.width + d;
    const Pack<T, N> mean = load<T, N>(args.mean, at), logvar = load<T, N>(args.logvar, at);
    Pack<T, N> given{}, g_z{}, d_mean, d_logvar;
    if (kSource != Source::kNoise) given = load<T, N>(args.given, at);
    if (args.g_z) g_z = load<T, N>(args.g_z, at);
#pragma unroll
    for (int i = 0; i < N; i++) {
      const Posterior q(as_float(mean.at[i]), as_float(logvar.at[i]));
      float eps, to_mean, to_logvar;
      const float z = row.draw(q, given.at[i], d + i, &eps);
      differentiate(q, z, eps, as_float(g_z.at[i]), g, args.free_bits, &to_mean, &to_logvar);
      d_mean.at[i] = rounded<T>(to_mean);
      d_logvar.at[i] = rounded<T>(to_logvar);
    }
    store(args.d_mean, at, d_mean);
    store(args.d_logvar, at, d_logvar);
  }
}

template <class T, int N, Source kSource>
void start(const GaussianForward& args, int blocks, cudaStream_t stream) {
  forward<T, N, kSource><<<blocks, 32 * kWarps, 0, stream>>>(args);
}

template <class T, int N, Source kSource>
void start(const GaussianBackward& args, int blocks, cudaStream_t stream) {
  backward<T, N, kSource><<<blocks, 32 * kWarps, 0, stream>>>(args);
}

template <class T, int N, class Args>
void start_source(const Args& args, int blocks, cudaStream_t stream) {
  if (args.source == Source::kNoise) start<T, N, Source::kNoise>(args, blocks, stream);
  else if (args.source == Source::kEps) start<T, N, Source::kEps>(args, blocks, stream);
  else start<T, N, Source::kZ>(args, blocks, stream);
}

template <class T, class Args>
void start_width(const Args& args, bool is_aligned, int blocks, cudaStream_t stream) {
  constexpr int kPack = 16 / sizeof(T);
  if (is_aligned && args.width % kPack == 0) start_source<T, kPack>(args, blocks, stream);
  else start_source<T, 1>(args, blocks, stream);
}

bool aligned(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers)
    if (reinterpret_cast<uintptr_t>(pointer) % 16) return false;
  return true;
}

template <class Args>
const char* launch(const Args& args, bool is_aligned, void* stream, int device) {
  if (args.rows == 0) return nullptr;
  const OnDevice on_device(device);
  if (const cudaError_t error = on_device.error()) return cudaGetErrorString(error);
  const int blocks = (int)((args.rows + kWarps - 1) / kWarps);
  if (args.is_bf16) start_width<__nv_bfloat16>(args, is_aligned, blocks, (cudaStream_t)stream);
  else start_width<float>(args, is_aligned, blocks, (cudaStream_t)stream);
  const cudaError_t error = cudaGetLastError();
  return error ? cudaGetErrorString(error) : nullptr;
}

}  // namespace

const char* gaussian_reparam_forward(const GaussianForward& args, void* stream, int device) {
  return launch(args, aligned({args.mean, args.logvar, args.given, args.z}), stream, device);
}

const char* gaussian_reparam_backward(const GaussianBackward& args, void* stream, int device) {
  const bool is_aligned = aligned({args.mean, args.logvar, args.given, args.g_z, args.d_mean, args.d_logvar});
  return launch(args, is_aligned, stream, device);
}

}  // namespace fastlatent
