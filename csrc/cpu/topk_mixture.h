// topk_mixture: the k likeliest ids of each row, their weights, and a token drawn among them.
#pragma once

#include "parallel_rows.h"
#include "softmax_row.h"

namespace fastlatent {
namespace FASTLATENT_ISA {

constexpr int kMostTopK = 64;

// The k largest logits so far, largest first; ids arrive in ascending order, and an equal one goes behind.
struct TopK {
  int k, size = 0;
  float logit[kMostTopK];
  int64_t id[kMostTopK];

  explicit TopK(int k) : k(k) {}

  bool takes(float x) const { return size < k || x > logit[k - 1]; }

  void add(float x, int64_t v) {
    int at = size < k ? size++ : k - 1;
    for (; at > 0 && x > logit[at - 1]; at--) logit[at] = logit[at - 1], id[at] = id[at - 1];
    logit[at] = x, id[at] = v;
  }
};

// The k largest of a row whose tiles have been added to `softmax` but not finished. The k largest of the tiles' own largest
// are at or above the k-th of all, so that most tiles need not be looked at again. A NaN is below nothing, and is kept.
template <class T>
static TopK k_largest(int k, const T* logits, int64_t vocab, const SoftmaxRow& softmax) {
  TopK of_tiles(k), top(k);
  for (int64_t tile = 0; tile < softmax.tiles; tile++)
    if (of_tiles.takes(softmax.largest[tile])) of_tiles.add(softmax.largest[tile], tile);
  const float least = of_tiles.size < k ? -kInfinity : of_tiles.logit[k - 1];
  for (int64_t tile = 0; tile < softmax.tiles; tile++) {
    if (softmax.largest[tile] < least) continue;
    const int64_t begin = tile * kTileSize, size = tile_size(tile, vocab);
    for (int64_t v = begin; v < begin + size; v++)
      if (!(load_one(logits + v) < least) && top.takes(load_one(logits + v))) top.add(load_one(logits + v), v);
  }
  return top;
}

// Place among the kept ids of the one with the best tile, then the best id in it.
static int draw_place(const TopK& top, const float* p, const RowNoise& noise) {
  constexpr int n = 16;
  uint32_t tile[kMostTopK], id[kMostTopK];
  float race[kMostTopK];
  for (int i = 0; i < kMostTopK; i++) {
    id[i] = (uint32_t)(i < top.k ? top.id[i] : 0);
    tile[i] = id[i] / kTileSize;
  }
  for (int i = 0; i < top.k; i += n) noise.exponential(tile + i, kStreamTile, race + i);
  uint32_t best_tile = 0;
  float best = -1;
  for (int i = 0; i < top.k; i++) {
    float mass = 0;
    for (int j = 0; j < top.k; j++) mass += tile[j] == tile[i] ? p[j] : 0.0f;
    if (mass / race[i] > best) best = mass / race[i], best_tile = tile[i];
  }
  for (int i = 0; i < top.k; i += n) noise.exponential(id + i, kStreamId, race + i);
  int place = 0;
  best = -1;
  for (int i = 0; i < top.k; i++)
    if (tile[i] == best_tile && p[i] / race[i] > best) best = p[i] / race[i], place = i;
  return place;
}

template <class T>
static void topk_mixture_rows(const TopkMixture& args) {
  parallel_rows(args, [&](int64_t b, float* scratch) {
    const T* logits = (const T*)args.logits + b * args.vocab;
    SoftmaxRow softmax(scratch, args.vocab);
    for_each_tile(logits, args.vocab, [&](int64_t tile, const T* part) {
      softmax.add_tile<false>(tile, part, args.inv_temperature);
    });
    const TopK top = k_largest(args.top_k, logits, args.vocab, softmax);
    softmax.finish(args.inv_temperature);

    // p relative to the likeliest token, whose 1 keeps the norm from underflow
    float p[kMostTopK], preceding = 0, kept = 0, squares = 0;
    const float likeliest = expf(top.logit[0] * args.inv_temperature - softmax.lse);
    for (int i = 0; i < args.top_k; i++) {
      p[i] = expf((top.logit[i] - top.logit[0]) * args.inv_temperature);
      const float share = p[i] * likeliest;
      if (args.top_p < 1 && preceding >= args.top_p) p[i] = 0;
      preceding += share;
      kept += p[i];
      squares += p[i] * p[i];
    }
    const float inv_norm = 1.0f / sqrtf(squares) + (softmax.lse - softmax.lse);  // a NaN elsewhere in the row shows
    for (int i = 0; i < args.top_k; i++) {
      args.ids[b * args.top_k + i] = top.id[i];
      args.weights[b * args.top_k + i] = p[i] * inv_norm;
    }
    const RowNoise noise(*args.seed, args.counter + 3 * b);
    const int place = args.greedy ? 0 : draw_place(top, p, noise);
    const float log_kept = logf(kept) + top.logit[0] * args.inv_temperature - softmax.lse;
    args.token[b] = top.id[place];
    args.logprob[b] = logprob(top.logit[place], args.inv_temperature, softmax.lse);
    args.log_kept[b] = log_kept > 0 ? 0.0f : log_kept;
    args.entropy[b] = softmax.entropy;
  });
}

void topk_mixture(const TopkMixture& args) {
  args.logits_bf16 ? topk_mixture_rows<BFloat16>(args) : topk_mixture_rows<float>(args);
}

}  // namespace FASTLATENT_ISA
}  // namespace fastlatent
