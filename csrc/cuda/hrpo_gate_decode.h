// hrpo_gate_decode on a GPU: what its launcher takes. Compiled, never run.
#pragma once

#include <cstdint>

namespace fastlatent {

struct HrpoGateDecode {
  const int64_t* token_ids = nullptr;  // [rows]
  const void* mixture = nullptr;       // [rows, width], bfloat16 as the table, the weight and the output
  const void* table = nullptr;         // [vocab, width]
  const void* weight = nullptr;        // [2 width, width]
  const float* bias = nullptr;         // [2 width]
  const float* lambda = nullptr;       // [width]
  const bool* latent = nullptr;        // [rows]
  void* out = nullptr;                 // [rows, width]
  int64_t rows = 0, width = 0, vocab = 0;
  float compat_eps = 0;
};

// Runs on `stream` (a cudaStream_t) of `device`; null, or what is wrong.
const char* hrpo_gate_decode(const HrpoGateDecode& args, void* stream, int device);

}  // namespace fastlatent
