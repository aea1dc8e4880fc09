// vocab_head in bfloat16, one stream over the vocabulary: the weights of a tile are read from memory once, for its
// logits and, where they are the embedding too, again from the cache for its part of the mixture. No [rows, vocab]
// tensor is made, and logits are not rounded to bfloat16.
#pragma once

#include "bf16_mix.h"
#include "draw.h"
#include "softmax_quad.h"

namespace fastlatent {
namespace FASTLATENT_ISA {

constexpr int64_t kGroupQuads = 16;  // quads of rows whose sums stay in the cache beside a tile of weights
constexpr int64_t kGroupRows = kGroupQuads * kQuadRows;

struct OneStream {
  const VocabHeadBf16& args;
  const int64_t tiles = num_tiles(args.vocab), tiles_per_split = args.tiles_per_split(args.vocab);
  const int64_t splits = args.splits(args.vocab), groups = (args.rows + kGroupRows - 1) / kGroupRows;
  const int64_t stride = (args.embed_width + kPairs - 1) / kPairs * kPairs;
  const bool is_tied = args.embed && args.embed == args.weight, has_own_embed = args.embed && !is_tied;

  SoftmaxRow softmax(int64_t b) const { return SoftmaxRow(nullptr, args.sums + b * 4 * tiles, tiles); }

  BFloat16* hidden(int64_t quad) const { return (BFloat16*)args.hidden_quads + quad * quad_size(args.width); }
  const BFloat16* weight(int64_t tile) const { return (const BFloat16*)args.weight + tile * kTileSize * args.width; }
  const BFloat16* embed(int64_t tile) const {
    return (const BFloat16*)args.embed + tile * kTileSize * args.embed_width;
  }

  Ahead ahead(const BFloat16* matrix, int64_t tile, int64_t width, int64_t steps) const {
    if (tile >= tiles) return {};
    return {matrix, tile_size(tile, args.vocab) * width * (int64_t)sizeof(BFloat16), steps};
  }

  // The steps that `dot` takes at least.
  int64_t dot_steps(int64_t blocks, int64_t size) const { return blocks * (size + 7) / 8 * (args.width / kChunk) + 1; }

  void pack(int64_t quad) const {
    const int64_t b = quad * kQuadRows;
    pack_quad((const BFloat16*)args.hidden + b * args.width, min(kQuadRows, args.rows - b), args.width, hidden(quad));
  }

  // The tiles of one split for one group of rows. `next_split` is likely this thread's next: its first
  // weights are fetched.
  void run(int64_t split, int64_t group, int64_t next_split) const {
    const int64_t begin = group * kGroupRows, rows = min(kGroupRows, args.rows - begin);
    const int64_t quads = (rows + kQuadRows - 1) / kQuadRows, blocks = (quads + kBlockQuads - 1) / kBlockQuads;
    float* part = args.part + (split * args.rows + begin) * stride;
    floats largest[kGroupQuads];
    alignas(64) float logits[kBlockQuads * kQuadTile];
    alignas(64) BFloat16 p[kGroupQuads * kQuadTile];
    for (int64_t q = 0; q < quads; q++) largest[q] = splat(-kInfinity);
    if (args.embed) __builtin_memset(part, 0, rows * stride * sizeof(float));
    const int64_t end = min(tiles, (split + 1) * tiles_per_split);
    for (int64_t tile = split * tiles_per_split; tile < end; tile++) {
      const int64_t size = tile_size(tile, args.vocab);
      // each product fetches what the next one reads; a tied mixture finds its weights in the cache
      const int64_t dots = dot_steps(blocks, size), mixes = quads * (size / 2) * num_panels(args.embed_width) + 1;
      const int64_t weight_steps = has_own_embed ? mixes : is_tied ? dots + mixes : dots;
      const int64_t next_tile = tile + 1 < end ? tile + 1 : next_split * tiles_per_split;
      Ahead next_weight = ahead(weight(next_tile), next_tile, args.width, weight_steps);
      Ahead next_embed = has_own_embed ? ahead(embed(tile), tile, args.embed_width, dots) : Ahead();
      for (int64_t q = 0; q < quads; q += kBlockQuads) {
        const int64_t some = min(kBlockQuads, quads - q);
        dot(q + begin / kQuadRows, some, tile, size, logits, has_own_embed ? next_embed : next_weight);
        for (int64_t i = 0; i < some; i++) {
          const int64_t r = (q + i) * kQuadRows, n = min(kQuadRows, rows - r);
          weigh(tile, begin + r, n, logits + i * kQuadTile, &largest[q + i], part + r * stride, p + r * kTileSize);
        }
      }
      if (args.embed) add_tile(p, embed(tile), args.embed_width, size, rows, part, stride, next_weight);
    }
    for (int64_t r = 0; r < rows; r++)
      args.largest[split * args.rows + begin + r] = largest[r / kQuadRows][r % kQuadRows * 4];
  }

  // The logits of a tile for up to kBlockQuads quads; -inf past the last id.
  void dot(int64_t quad, int64_t quads, int64_t tile, int64_t size, float* logits, Ahead& next) const {
    const auto run = [&](auto dot) { dot(hidden(quad), weight(tile), args.width, size, logits, next); };
    switch (quads) {
      case 1: run(dot_quads<1>); break;
      case 2: run(dot_quads<2>); break;
      case 3: run(dot_quads<3>); break;
      default: run(dot_quads<kBlockQuads>);
    }
    for (int64_t q = 0; q < quads; q++)
      for (int64_t v = size; v < kTileSize; v++)
        for (int64_t r = 0; r < kQuadRows; r++) *logit(logits + q * kQuadTile, r, v) = -kInfinity;
  }

  static float* logit(float* logits, int64_t r, int64_t v) { return logits + v / 4 * 4 * kQuadRows + r * 4 + v % 4; }

  // Rows of `args.logits` from the logits of one tile and a quad of `rows` rows.
  void spread(int64_t tile, int64_t size, int64_t b, int64_t rows, const float* logits) const {
    for (int64_t r = 0; r < rows; r++) {
      float* row = args.logits + (b + r) * args.vocab + tile * kTileSize;
      for (int64_t v = 0; v < size; v += 4)
        __builtin_memcpy(row + v, logits + v * kQuadRows + r * 4, min(4, size - v) * sizeof(float));
    }
  }

  // As `run`, where nothing but the logits is wanted.
  void run_logits(int64_t split, int64_t group, int64_t next_split) const {
    const int64_t begin = group * kGroupRows, rows = min(kGroupRows, args.rows - begin);
    const int64_t quads = (rows + kQuadRows - 1) / kQuadRows, blocks = (quads + kBlockQuads - 1) / kBlockQuads;
    alignas(64) float logits[kBlockQuads * kQuadTile];
    const int64_t end = min(tiles, (split + 1) * tiles_per_split);
    for (int64_t tile = split * tiles_per_split; tile < end; tile++) {
      const int64_t size = tile_size(tile, args.vocab), next_tile = tile + 1 < end ? tile + 1 : next_split * tiles_per_split;
      Ahead next_weight = ahead(weight(next_tile), next_tile, args.width, dot_steps(blocks, size));
      for (int64_t q = 0; q < quads; q += kBlockQuads) {
        const int64_t some = min(kBlockQuads, quads - q);
        dot(q + begin / kQuadRows, some, tile, size, logits, next_weight);
        for (int64_t i = 0; i < some; i++) {
          const int64_t r = (q + i) * kQuadRows;
          spread(tile, size, begin + r, min(kQuadRows, rows - r), logits + i * kQuadTile);
        }
      }
    }
  }

  // The tile's sums for the `rows` of a quad, and where there is a mixture p = exp(l - largest), with `largest` that of
  // the split so far, to which `part` is brought.
  void weigh(int64_t tile, int64_t b, int64_t rows, float* logits, floats* largest, float* part, BFloat16* p) const {
    const QuadSums sums = args.embed ? sum_quad<true>(logits, args.inv_temperature)
                                     : sum_quad<false>(logits, args.inv_temperature);
    for (int64_t r = 0; r < rows; r++) softmax(b + r).set_tile(tile, sums.row(r));
    if (!args.embed) return;
    const floats before = *largest, now = larger(sums.largest, before);
    const floats shrink = relative(before, now, args.inv_temperature);
    *largest = now;
    for (int64_t r = 0; r < rows; r++) {
      if (now[4 * r] == before[4 * r]) continue;
      float* row = part + r * stride;
      for (int64_t i = 0; i < stride; i += kLanes) store(row + i, load(row + i) * shrink[4 * r]);
    }
    const floats factor = relative(sums.largest, now, args.inv_temperature);
    for (int i = 0; i < kQuadTile; i += kLanes) {
      const __m256bh rounded = _mm512_cvtneps_pbh((__m512)(load(logits + i) * factor));
      __builtin_memcpy(p + i, &rounded, sizeof rounded);
    }
  }

  // Of a row's softmax what is left to use once its tile is drawn.
  struct Drawn {
    int64_t tile = 0;
    float largest, total_squares, entropy, lse;
  };

  // To be called once: it brings the row's sums to one scale.
  Drawn draw(int64_t b) const {
    SoftmaxRow row = softmax(b);
    int64_t tile = 0;
    for (int64_t c = 0; c < tiles; c++)
      if (row.largest[c] > row.row_largest) row.row_largest = row.largest[c], tile = c;
    row.finish(args.inv_temperature);
    if (!args.greedy) tile = draw_tile(row, noise(b));
    return {tile, row.row_largest, row.total_squares, row.entropy, row.lse};
  }

  RowNoise noise(int64_t b) const { return RowNoise(*args.seed, args.counter + 3 * b); }

  // Everything of a quad's rows that takes all tiles. The logits of a drawn tile are computed anew, while the weights of
  // the next row's are fetched.
  void finish(int64_t quad) const {
    const int64_t begin = quad * kQuadRows, rows = min(kQuadRows, args.rows - begin);
    Drawn drawn[kQuadRows];
    for (int64_t r = 0; r < rows; r++) drawn[r] = draw(begin + r);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t b = begin + r, tile = drawn[r].tile, size = tile_size(tile, args.vocab);
      Ahead next;
      if (r + 1 < rows) next = ahead(weight(drawn[r + 1].tile), drawn[r + 1].tile, args.width, dot_steps(1, size));
      alignas(64) float logits_of_quad[kQuadTile];
      dot(quad, 1, tile, size, logits_of_quad, next);
      float logits[kTileSize];
      for (int64_t v = 0; v < size; v++) logits[v] = *logit(logits_of_quad, r, v);
      const int64_t first = tile * kTileSize;
      const int64_t place =
          args.greedy ? likeliest(logits, size) : draw_in_tile(logits, first, size, args.inv_temperature, noise(b));
      args.token[b] = first + place;
      args.logprob[b] = logprob(logits[place], args.inv_temperature, drawn[r].lse);
      args.entropy[b] = drawn[r].entropy;
      if (args.embed) mix(b, drawn[r]);
    }
  }

  void mix(int64_t b, const Drawn& drawn) const {
    const float inv_norm = 1.0f / sqrtf(drawn.total_squares);
    float factor[VocabHeadBf16::kMostSplits];
    for (int64_t split = 0; split < splits; split++)
      factor[split] = relative(args.largest[split * args.rows + b], drawn.largest, args.inv_temperature);
    BFloat16* out = (BFloat16*)args.mixture + b * args.embed_width;
    for (int64_t i = 0; i < args.embed_width; i += kPairs) {
      floats low = {}, high = {};
      for (int64_t split = 0; split < splits; split++) {
        const float* part = args.part + (split * args.rows + b) * stride + i;
        low += load(part) * factor[split];
        high += load(part + kLanes) * factor[split];
      }
      for (int half = 0; half < 2 && i + half * kLanes < args.embed_width; half++)
        store_some(out + i + half * kLanes, in_order(low, high, half) * inv_norm, args.embed_width - i - half * kLanes);
    }
  }

  static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
};

// Lays the rows out, then calls `run` for every split and group, with the split that its thread will probably take next.
template <class Run>
static void run_tasks(const OneStream& stream, Run run) {
  const VocabHeadBf16& args = stream.args;
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(args.threads)
#endif
  for (int64_t quad = 0; quad < args.quads(args.rows); quad++) stream.pack(quad);
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) num_threads(args.threads)
#endif
  for (int64_t task = 0; task < stream.splits * stream.groups; task++)
    run(task / stream.groups, task % stream.groups, (task + args.threads) / stream.groups);
}

void head_logits_bf16(const VocabHeadBf16& args) {
  const OneStream stream{args};
  run_tasks(stream, [&](int64_t split, int64_t group, int64_t next) { stream.run_logits(split, group, next); });
}

void vocab_head_bf16(const VocabHeadBf16& args) {
  const OneStream stream{args};
  run_tasks(stream, [&](int64_t split, int64_t group, int64_t next) { stream.run(split, group, next); });
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(args.threads)
#endif
  for (int64_t quad = 0; quad < args.quads(args.rows); quad++) stream.finish(quad);
}

}  // namespace FASTLATENT_ISA
}  // namespace fastlatent
