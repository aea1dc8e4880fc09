// vocab_head on a Hopper GPU in one pass over the tied weights: what its launcher takes. Compiled, never run.
#pragma once

#include <cstdint>

namespace fastlatent {

struct OnePassHead {
  const void* hidden = nullptr;  // [rows, width], bfloat16 as the weight and the mixture
  const void* weight = nullptr;  // [vocab, width]
  int64_t rows = 0, vocab = 0, width = 0;
  float inv_temperature = 1;
  const int64_t* seed = nullptr;     // one
  const int64_t* counter = nullptr;  // [rows, 3]: position, prompt id, step * 2^16 + sample
  bool greedy = false;
  int64_t* token = nullptr;   // [rows]
  float* logprob = nullptr;   // [rows]
  float* entropy = nullptr;   // [rows]
  void* mixture = nullptr;    // [rows, width]
  int64_t clusters = 1;       // pieces of the vocabulary, at most one a tile of 128 ids
  void* parts = nullptr;      // scratch: [clusters, rows] of RowPart, 6 numbers of 4 bytes
  float* logits = nullptr;    // scratch: [clusters, rows, 128], of the tile that leads
  float* mixtures = nullptr;  // scratch: [clusters, rows, width]
};

// Runs on `stream` (a cudaStream_t) of `device`; null, or what is wrong.
const char* one_pass_head(const OnePassHead& args, void* stream, int device);

// How many clusters for this width `device` can run at once; null, or what is wrong.
const char* one_pass_clusters(int64_t width, int device, int64_t* clusters);

}  // namespace fastlatent
