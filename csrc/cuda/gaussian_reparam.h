// gaussian_reparam on a GPU: what its launchers take. Compiled, never run.
#pragma once

#include <cstdint>

namespace fastlatent {

enum class Source : int32_t { kNoise = 0, kEps = 1, kZ = 2 };

struct GaussianInputs {
  const void* mean = nullptr;    // [rows, width]
  const void* logvar = nullptr;  // [rows, width]
  const void* given = nullptr;   // [rows, width], eps or z; null where noise is drawn
  const int64_t* seed = nullptr;     // one
  const int64_t* counter = nullptr;  // [rows, 3]: position, prompt id, step * 2^16 + sample
  bool is_bf16 = false;              // all [rows, width] tensors, else float32
  Source source = Source::kNoise;
  int64_t rows = 0, width = 0;
  float free_bits = 0;
};

struct GaussianForward : GaussianInputs {
  void* z = nullptr;          // [rows, width]; null where z is given
  float* kl = nullptr;        // [rows]
  float* logprob = nullptr;   // [rows]
  float* variance = nullptr;  // [rows]
};

struct GaussianBackward : GaussianInputs {
  const void* g_z = nullptr;  // [rows, width]; a null gradient is 0
  const float *g_kl = nullptr, *g_logprob = nullptr, *g_variance = nullptr;  // [rows]
  void *d_mean = nullptr, *d_logvar = nullptr;                               // [rows, width]
};

// Run on `stream` (a cudaStream_t) of `device`; null, or what CUDA says is wrong.
const char* gaussian_reparam_forward(const GaussianForward& args, void* stream, int device);
const char* gaussian_reparam_backward(const GaussianBackward& args, void* stream, int device);

}  // namespace fastlatent
