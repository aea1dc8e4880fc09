// What Python hands to a kernel: pointers into checked, contiguous tensors, sizes and options. No torch headers anywhere.
#pragma once

#include <cstdint>

namespace fastlatent {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1 };

// Ids in one tile of two-level sampling: part of the definition of a draw (noise.py), not a tuning knob.
constexpr int kTileSize = 128;

// Floats of scratch one thread needs for a row: the exponentials of the padded row and four sums per tile.
constexpr int64_t scratch_floats(int64_t vocab) {
  const int64_t tiles = (vocab + kTileSize - 1) / kTileSize;
  return tiles * (kTileSize + 4);
}

struct Rows {
  const void* logits;      // [rows, vocab]
  DType logits_dtype;
  int64_t rows, vocab;
  float inv_temperature;
  const int64_t* seed;     // one
  const int64_t* counter;  // [rows, 3]: position, prompt id, step * 2^16 + sample
  bool greedy;
  int64_t* token;          // [rows]
  float* logprob;          // [rows]
  float* entropy;          // [rows]
  float* scratch;          // [threads, scratch_floats(vocab)]
  int32_t threads;
};

struct VocabHead : Rows {
  void* unit_p;            // [rows, vocab], p / ||p||_2; null where no mixture is wanted
  DType unit_p_dtype;
};

struct TopkMixture : Rows {
  int32_t top_k;           // 1 .. 64
  float top_p;
  float* log_kept;         // [rows]
  int64_t* ids;            // [rows, top_k]
  float* weights;          // [rows, top_k]
};

}  // namespace fastlatent
