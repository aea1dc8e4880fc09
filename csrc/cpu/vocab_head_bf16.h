// vocab_head in bfloat16, one stream over the vocabulary: the weights of a tile are read from memory once, for its
// logits and, where they are the embedding too, again from the cache for its part of the mixture. No [rows, vocab]
// tensor is made, and logits are not rounded to bfloat16.
#pragma once

#include "bf16_dot.h"
#include "draw.h"

namespace fastlatent {
namespace FASTLATENT_ISA {

constexpr int64_t kGroupRows = 64;  // rows whose sums stay in the cache beside a tile of weights

template <int n>
struct Constant {
  constexpr operator int() const { return n; }
};

// Calls `call(first row, number of rows as a constant)` for each block of the rows of a group.
template <class Call>
static inline void for_each_block(int64_t rows, Call call) {
  int64_t r = 0;
  for (; r + kBlockRows <= rows; r += kBlockRows) call(r, Constant<kBlockRows>());
  switch (rows - r) {
    case 5: return call(r, Constant<5>());
    case 4: return call(r, Constant<4>());
    case 3: return call(r, Constant<3>());
    case 2: return call(r, Constant<2>());
    case 1: return call(r, Constant<1>());
  }
}

struct OneStream {
  const VocabHeadBf16& args;
  const int64_t tiles = num_tiles(args.vocab), tiles_per_split = args.tiles_per_split(args.vocab);
  const int64_t splits = args.splits(args.vocab), groups = (args.rows + kGroupRows - 1) / kGroupRows;
  const int64_t stride = (args.embed_width + kPairs - 1) / kPairs * kPairs;

  SoftmaxRow softmax(int64_t b) const { return SoftmaxRow(nullptr, args.sums + b * 4 * tiles, tiles); }

  const BFloat16* hidden(int64_t b) const { return (const BFloat16*)args.hidden + b * args.width; }
  const BFloat16* weight(int64_t tile) const { return (const BFloat16*)args.weight + tile * kTileSize * args.width; }
  const BFloat16* embed(int64_t tile) const {
    return (const BFloat16*)args.embed + tile * kTileSize * args.embed_width;
  }

  Ahead ahead(const BFloat16* matrix, int64_t tile, int64_t width) const {
    if (tile >= tiles) return {};
    return {(const char*)matrix, tile_size(tile, args.vocab) * width * (int64_t)sizeof(BFloat16)};
  }

  // The tiles of one split for one group of rows.
  void run(int64_t split, int64_t group) const {
    const int64_t begin = group * kGroupRows, rows = min(kGroupRows, args.rows - begin);
    float* largest = args.largest + split * args.rows + begin;
    float* part = args.part + (split * args.rows + begin) * stride;
    alignas(64) float logits[kGroupRows * kTileSize];
    alignas(64) BFloat16 p[kGroupRows * kTileSize];
    for (int64_t r = 0; r < rows; r++) largest[r] = -kInfinity;
    if (args.embed) __builtin_memset(part, 0, rows * stride * sizeof(float));
    const int64_t end = min(tiles, (split + 1) * tiles_per_split);
    for (int64_t tile = split * tiles_per_split; tile < end; tile++) {
      const int64_t size = tile_size(tile, args.vocab);
      // each product fetches what the next one reads; a tied mixture finds its weights in the cache
      const Ahead next_weight = ahead(weight(tile + 1), tile + 1, args.width);
      Ahead next = next_weight;
      if (args.embed) next = args.embed == args.weight ? Ahead() : ahead(embed(tile), tile, args.embed_width);
      for_each_block(rows, [&](int64_t r, auto n) {
        dot_rows<n>(hidden(begin + r), weight(tile), args.width, size, logits + r * kTileSize, next.part(r, r + n, rows));
      });
      for (int64_t r = 0; r < rows; r++) {
        float* row = logits + r * kTileSize;
        for (int64_t v = size; v < kTileSize; v++) row[v] = -kInfinity;
        softmax(begin + r).set_tile(
            tile, args.embed ? weigh(row, largest + r, part + r * stride, p + r * kTileSize)
                             : sum_tile<false>(row, args.inv_temperature, nullptr));
      }
      if (!args.embed) continue;
      for_each_block(rows, [&](int64_t r, auto n) {
        add_rows<n>(p + r * kTileSize, embed(tile), args.embed_width, size, part + r * stride, stride,
                    next_weight.part(r, r + n, rows));
      });
    }
  }

  // p = exp(l - largest), with `largest` that of the split so far, to which `part` is brought; the tile's sums.
  TileSums weigh(float* logits, float* largest, float* part, BFloat16* p) const {
    const TileSums sums = sum_tile<true>(logits, args.inv_temperature, logits);
    if (sums.largest > *largest) {
      const float factor = relative(*largest, sums.largest);
      for (int64_t i = 0; i < stride; i += kLanes) store(part + i, load(part + i) * factor);
      *largest = sums.largest;
    }
    const float factor = relative(sums.largest, *largest);
    for (int i = 0; i < kTileSize; i += kLanes) store(p + i, load(logits + i) * factor);
    return sums;
  }

  // exp of the difference of two logits, 0 for -inf
  float relative(float logit, float largest) const {
    return logit == -kInfinity ? 0.0f : expf((logit - largest) * args.inv_temperature);
  }

  // Everything of a row that takes all of its tiles.
  void finish(int64_t b) const {
    SoftmaxRow row = softmax(b);
    int64_t tile = 0;
    for (int64_t c = 0; c < tiles; c++)
      if (row.largest[c] > row.row_largest) row.row_largest = row.largest[c], tile = c;
    row.finish(args.inv_temperature);
    const RowNoise noise(*args.seed, args.counter + 3 * b);
    if (!args.greedy) tile = draw_tile(row, noise);
    alignas(64) float logits[kTileSize];
    const int64_t first = tile * kTileSize, size = tile_size(tile, args.vocab);
    dot_rows<1>(hidden(b), weight(tile), args.width, size, logits, {});
    const int64_t place =
        args.greedy ? likeliest(logits, size) : draw_in_tile(logits, first, size, args.inv_temperature, noise);
    args.token[b] = first + place;
    args.logprob[b] = logprob(logits[place], args.inv_temperature, row.lse);
    args.entropy[b] = row.entropy;
    if (args.embed) mix(b, row);
  }

  static int64_t likeliest(const float* logits, int64_t size) {
    int64_t place = 0;
    for (int64_t i = 1; i < size; i++) place = logits[i] > logits[place] ? i : place;
    return place;
  }

  void mix(int64_t b, const SoftmaxRow& row) const {
    const float inv_norm = 1.0f / sqrtf(row.total_squares);
    BFloat16* out = (BFloat16*)args.mixture + b * args.embed_width;
    for (int64_t i = 0; i < args.embed_width; i += kLanes) {
      floats sum = {};
      for (int64_t split = 0; split < splits; split++) {
        const int64_t at = split * args.rows + b;
        sum += load(args.part + at * stride + i) * relative(args.largest[at], row.row_largest);
      }
      store_some(out + i, sum * inv_norm, args.embed_width - i);
    }
  }

  static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
};

void vocab_head_bf16(const VocabHeadBf16& args) {
  const OneStream stream{args};
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) num_threads(args.threads)
#endif
  for (int64_t task = 0; task < stream.splits * stream.groups; task++)
    stream.run(task / stream.groups, task % stream.groups);
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(args.threads)
#endif
  for (int64_t b = 0; b < args.rows; b++) stream.finish(b);
}

}  // namespace FASTLATENT_ISA
}  // namespace fastlatent
