// What Python hands to a kernel: pointers into checked, contiguous tensors, sizes and options. No torch headers.
#pragma once

#include <cstdint>

namespace fastlatent {

// Ids in one tile of two-level sampling: part of the definition of a draw (noise.py), not a tuning knob.
constexpr int kTileSize = 128;

// Floats of scratch one thread needs for a row: the exponentials of the padded row and four sums per tile.
constexpr int64_t scratch_floats(int64_t vocab) {
  const int64_t tiles = (vocab + kTileSize - 1) / kTileSize;
  return tiles * (kTileSize + 4);
}

struct Rows {
  const void* logits = nullptr;  // [rows, vocab], bfloat16 or float32
  bool logits_bf16 = false;
  int64_t rows = 0, vocab = 0;
  float inv_temperature = 1;
  const int64_t* seed = nullptr;     // one
  const int64_t* counter = nullptr;  // [rows, 3]: position, prompt id, step * 2^16 + sample
  bool greedy = false;
  int64_t* token = nullptr;   // [rows]
  float* logprob = nullptr;   // [rows]
  float* entropy = nullptr;   // [rows]
  float* scratch = nullptr;   // [threads, scratch_floats(vocab)]
  int32_t threads = 1;
};

struct VocabHead : Rows {
  void* unit_p = nullptr;  // [rows, vocab], p / ||p||_2, bfloat16 or float32; null where no mixture is wanted
  bool unit_p_bf16 = false;
};

struct TopkMixture : Rows {
  int32_t top_k = 0;  // 1 .. 64
  float top_p = 1;
  float* log_kept = nullptr;  // [rows]
  int64_t* ids = nullptr;     // [rows, top_k]
  float* weights = nullptr;   // [rows, top_k]
};

}  // namespace fastlatent
