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

  // A row's sums, of whole splits instead of tiles.
  SoftmaxRow softmax(int64_t b) const { return SoftmaxRow(nullptr, args.sums + b * 4 * splits, splits); }

  TileDraw& draw(int64_t split, int64_t b) const { return args.draws[split * args.rows + b]; }

  float* part(int64_t split, int64_t b) const { return args.part + (split * args.rows + b) * stride; }

  RowNoise noise(int64_t b) const { return RowNoise(*args.seed, args.counter + 3 * b); }

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
    const int64_t first = split * tiles_per_split, end = min(tiles, first + tiles_per_split);
    QuadSums sums[kGroupQuads];
    float race[kGroupRows][kRaces];
    alignas(64) float logits[kBlockQuads * kQuadTile];
    alignas(64) BFloat16 p[kGroupQuads * kQuadTile];
    for (int64_t tile = first; tile < end; tile++) {
      const int64_t size = tile_size(tile, args.vocab);
      if (!args.greedy && (tile - first) % kRaces == 0)
        for (int64_t r = 0; r < rows; r++) tile_races(noise(begin + r), tile, race[r]);
      // each product fetches what the next one reads; a tied mixture finds its weights in the cache
      const int64_t dots = dot_steps(blocks, size), mixes = add_steps(args.embed_width, size, rows);
      const int64_t weight_steps = has_own_embed ? mixes : is_tied ? dots + mixes : dots;
      const int64_t next_tile = tile + 1 < end ? tile + 1 : next_split * tiles_per_split;
      Ahead next_weight = ahead(weight(next_tile), next_tile, args.width, weight_steps);
      Ahead next_embed = has_own_embed ? ahead(embed(tile), tile, args.embed_width, dots) : Ahead();
      for (int64_t q = 0; q < quads; q += kBlockQuads) {
        const int64_t some = min(kBlockQuads, quads - q);
        dot(q + begin / kQuadRows, some, tile, size, logits, has_own_embed ? next_embed : next_weight);
        for (int64_t i = 0; i < some; i++) {
          const int64_t r = (q + i) * kQuadRows, n = min(kQuadRows, rows - r);
          weigh(split, tile, begin + r, n, logits + i * kQuadTile, sums[q + i], race[r] + (tile - first) % kRaces,
                p + r * kTileSize);
        }
      }
      if (args.embed)
        add_tile(p, embed(tile), args.embed_width, size, rows, tile == first, part(split, begin), stride, next_weight);
    }
    for (int64_t r = 0; r < rows; r++) softmax(begin + r).set_tile(split, sums[r / kQuadRows].row(r % kQuadRows));
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

  // Takes the logits of a tile for the `rows` of a quad into their sums, the draw and, where there is a mixture, p, to
  // whose scale `part` is brought. A row's `race` is kRaces after that of the row before.
  void weigh(int64_t split, int64_t tile, int64_t b, int64_t rows, const float* logits, QuadSums& sums, const float* race,
             BFloat16* p) const {
    const bool is_first = tile == split * tiles_per_split;
    const floats before = sums.largest;
    const auto [shrink, mass] = args.embed ? sums.add<true>(logits, args.inv_temperature, p)
                                           : sums.add<false>(logits, args.inv_temperature, p);
    for (int64_t r = 0; r < rows; r++) {
      TileDraw& best = draw(split, b + r);
      const float factor = shrink[4 * r], score = args.greedy ? 0 : mass[4 * r] / race[r * kRaces];
      const bool wins = args.greedy ? sums.largest[4 * r] > before[4 * r] : score > best.score * factor;
      if (is_first || wins) {
        best.score = score;
        best.tile = (int32_t)tile;
        for (int64_t v = 0; v < kTileSize; v += 4) __builtin_memcpy(best.logits + v, logits + v * kQuadRows + r * 4, 16);
      } else {
        best.score *= factor;
      }
      if (!args.embed || is_first || factor == 1) continue;
      float* row = part(split, b + r);
      for (int64_t i = 0; i < stride; i += kLanes) store(row + i, load(row + i) * factor);
    }
  }

  // Everything of a row that takes all splits.
  void finish(int64_t b) const {
    SoftmaxRow row = softmax(b);
    int64_t chosen = 0;
    for (int64_t split = 0; split < splits; split++)
      if (row.largest[split] > row.row_largest) row.row_largest = row.largest[split], chosen = split;
    row.finish(args.inv_temperature);
    const float* factor = row.largest;  // of the split's exps, now
    if (!args.greedy) {
      float best = -1;
      for (int64_t split = 0; split < splits; split++) {
        const float score = draw(split, b).score * factor[split];
        if (score > best) best = score, chosen = split;
      }
    }
    const TileDraw& drawn = draw(chosen, b);
    const int64_t begin = (int64_t)drawn.tile * kTileSize, size = tile_size(drawn.tile, args.vocab);
    const int64_t place = args.greedy ? likeliest(drawn.logits, size)
                                      : draw_in_tile(drawn.logits, begin, size, args.inv_temperature, noise(b));
    args.token[b] = begin + place;
    args.logprob[b] = logprob(drawn.logits[place], args.inv_temperature, row.lse);
    args.entropy[b] = row.entropy;
    if (args.embed) mix(b, factor, 1.0f / sqrtf(row.total_squares));
  }

  // The mixture of a row from its parts, which are brought together in the first.
  void mix(int64_t b, const float* factor, float inv_norm) const {
    float* sum = part(0, b);
    for (int64_t split = 0; split < splits; split++) {
      const float* added = part(split, b);
      for (int64_t i = 0; i < stride; i += kLanes)
        store(sum + i, load(added + i) * factor[split] + (split ? load(sum + i) : floats{}));
    }
    BFloat16* out = (BFloat16*)args.mixture + b * args.embed_width;
    for (int64_t i = 0; i < args.embed_width; i += kPairs)
      for (int half = 0; half < 2 && i + half * kLanes < args.embed_width; half++)
        store_some(out + i + half * kLanes, in_order(load(sum + i), load(sum + i + kLanes), half) * inv_norm,
                   args.embed_width - i - half * kLanes);
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
  for (int64_t b = 0; b < args.rows; b++) stream.finish(b);
}

}  // namespace FASTLATENT_ISA
}  // namespace fastlatent
