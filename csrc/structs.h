// What Python hands to a kernel: pointers into checked, contiguous tensors, sizes and options. No torch headers.
#pragma once

#include <cstdint>

namespace fastlatent {

// Ids in one tile of two-level sampling: part of the definition of a draw (noise.py), not a tuning knob.
constexpr int kTileSize = 128;

constexpr int64_t num_tiles(int64_t vocab) { return (vocab + kTileSize - 1) / kTileSize; }

// Ids in a tile: the last one may have fewer.
constexpr int64_t tile_size(int64_t tile, int64_t vocab) {
  return vocab - tile * kTileSize < kTileSize ? vocab - tile * kTileSize : kTileSize;
}

// Floats of scratch one thread needs for a row: the exponentials of the padded row and four sums per tile.
constexpr int64_t scratch_floats(int64_t vocab) { return num_tiles(vocab) * (kTileSize + 4); }

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

struct TileDraw {  // of a row's tiles in one split, the one to draw
  float score;  // its mass relative to the split's largest logit, over -log(u)
  int32_t tile;
  float logits[kTileSize];
};

struct VocabHeadBf16 {  // the whole head; all matrices are bfloat16
  static constexpr int kQuadRows = 4, kChunk = 8;  // rows, and numbers of each, that share a vector

  const void* hidden = nullptr;   // [rows, width]
  const void* weight = nullptr;   // [vocab, width]
  const void* embed = nullptr;    // [vocab, embed_width], may be `weight`; null where no mixture is wanted
  int64_t rows = 0, vocab = 0, width = 0, embed_width = 0;
  float inv_temperature = 1;
  const int64_t* seed = nullptr;     // one
  const int64_t* counter = nullptr;  // [rows, 3], as in Rows
  bool greedy = false;
  int64_t* token = nullptr;   // [rows]
  float* logprob = nullptr;   // [rows]
  float* entropy = nullptr;   // [rows]
  void* mixture = nullptr;    // [rows, embed_width]
  float* logits = nullptr;    // [rows, vocab], all that head_logits_bf16 writes
  void* hidden_quads = nullptr;  // scratch: [quads, width / kChunk rounded up, kQuadRows, kChunk], bfloat16
  float* sums = nullptr;      // scratch: [rows, 4, splits]
  TileDraw* draws = nullptr;  // scratch: [splits, rows]
  float* part = nullptr;      // scratch: [splits, rows, embed_width rounded up to 32]
  int32_t threads = 1;

  static constexpr int64_t quads(int64_t rows) { return (rows + kQuadRows - 1) / kQuadRows; }

  // Pieces of the vocabulary that are summed apart: as many whatever the rows and threads are, so that neither
  // changes a row's rounding.
  static constexpr int64_t kMostSplits = 32;
  static constexpr int64_t tiles_per_split(int64_t vocab) { return (num_tiles(vocab) + kMostSplits - 1) / kMostSplits; }
  static constexpr int64_t splits(int64_t vocab) {
    return (num_tiles(vocab) + tiles_per_split(vocab) - 1) / tiles_per_split(vocab);
  }
};

struct TopkMixture : Rows {
  int32_t top_k = 0;  // 1 .. 64
  float top_p = 1;
  float* log_kept = nullptr;  // [rows]
  int64_t* ids = nullptr;     // [rows, top_k]
  float* weights = nullptr;   // [rows, top_k]
};

struct TopkGumbel : Rows {  // token: the likeliest; logprob: [rows, top_k]
  int32_t top_k = 0;  // 1 .. 64
  float top_p = 1;
  float low = 0, high = 0, shift = 0, scale = 1;  // noise = scale * (clip(gumbel, low, high) + shift)
  float inv_mixture_temperature = 1;
  int64_t* ids = nullptr;             // [rows, top_k]
  float* score = nullptr;             // [rows, top_k]
  float* weights = nullptr;           // [rows, top_k]
  float* log_kept = nullptr;          // [rows]
  int64_t* num_candidates = nullptr;  // [rows]
};

struct HrpoGate {
  const void *u = nullptr, *token = nullptr, *mixture = nullptr;  // [rows, 2 width], [rows, width] twice
  bool is_bf16 = false;              // bfloat16 or float32, all three and the output
  const float* bias = nullptr;       // [2 width]
  const float* log_scale = nullptr;  // [width], -c softplus(-Lambda)
  const bool* latent = nullptr;      // [rows]
  float compat_eps = 0;
  void* out = nullptr;  // [rows, width]
  int64_t rows = 0, width = 0;
  int32_t threads = 1;
};

struct HrpoGateBackward : HrpoGate {  // `out` is not used
  const void* grad = nullptr;  // [rows, width]
  void *du = nullptr, *dtoken = nullptr, *dmixture = nullptr;  // the last two null where they are not wanted
  int64_t chunk_rows = 1;      // rows whose column sums are one row of `partial`
  float* partial = nullptr;    // [chunks, 3, width]: gradients of the bias' halves and of log_scale
};

struct SoftEmbedding {  // forward, and the gradients of weight and table; each uses a part
  const int64_t* ids = nullptr;   // [rows, mixed], below vocab
  const float* weight = nullptr;  // [rows, mixed]
  const void* table = nullptr;    // [vocab, width]
  const void* grad = nullptr;     // [rows, width], of the output
  bool is_bf16 = false;           // bfloat16 or float32: table, grad, and an output of `width`
  const int64_t* place = nullptr;  // [rows * mixed], places in `ids` in the order of the ids there
  const int64_t* begin = nullptr;  // [vocab + 1], where the places of an id begin
  void* out = nullptr;  // [rows, width]; gradient of weight: [rows, mixed] floats; of table: [vocab, width]
  float* scratch = nullptr;  // [threads, width]
  int64_t rows = 0, mixed = 0, vocab = 0, width = 0;
  int32_t threads = 1;
};

}  // namespace fastlatent
