// vocab_head after its GEMM: token, log-probability, entropy and p / ||p||_2 of each row of logits.
#pragma once

#include "parallel_rows.h"
#include "softmax_row.h"

namespace fastlatent {
namespace FASTLATENT_ISA {

template <class T>
static int64_t likeliest_id(const T* logits, int64_t vocab, float largest) {
  int64_t id = 0;
  while (id < vocab - 1 && load_one(logits + id) != largest) id++;
  return id;
}

// The tile, then the id inside it, with the largest mass / -log(u).
template <class T>
static int64_t draw_id(const T* logits, int64_t vocab, float inv_temperature, const SoftmaxRow& softmax,
                       const RowNoise& noise) {
  constexpr int n = 16;
  uint32_t index[n];
  float race[n];
  int64_t tile = 0;
  float best = -1;
  for (int64_t first = 0; first < softmax.tiles; first += n) {
    for (int i = 0; i < n; i++) index[i] = (uint32_t)(first + i);
    noise.exponential(index, kStreamTile, race);
    for (int i = 0; i < n && first + i < softmax.tiles; i++) {
      const float score = softmax.mass[first + i] / race[i];
      if (score > best) best = score, tile = first + i;
    }
  }
  const int64_t begin = tile * kTileSize, end = begin + kTileSize < vocab ? begin + kTileSize : vocab;
  float shift = -kInfinity;
  for (int64_t v = begin; v < end; v++) shift = load_one(logits + v) > shift ? load_one(logits + v) : shift;
  int64_t id = begin;
  best = -1;
  for (int64_t first = begin; first < end; first += n) {
    for (int i = 0; i < n; i++) index[i] = (uint32_t)(first + i);
    noise.exponential(index, kStreamId, race);
    for (int i = 0; i < n && first + i < end; i++) {
      const float score = expf((load_one(logits + first + i) - shift) * inv_temperature) / race[i];
      if (score > best) best = score, id = first + i;
    }
  }
  return id;
}

template <class P>
static void write_unit_p(const SoftmaxRow& softmax, int64_t vocab, P* out) {
  const float inv_norm = 1.0f / sqrtf(softmax.total_squares);
  for (int64_t tile = 0; tile < softmax.tiles; tile++) {
    const float factor = softmax.largest[tile] * inv_norm;
    const int64_t begin = tile * kTileSize, size = vocab - begin < kTileSize ? vocab - begin : kTileSize;
    P whole[kTileSize];
    P* to = size == kTileSize ? out + begin : whole;
    for (int i = 0; i < kTileSize; i += kLanes) store(to + i, load(softmax.exps + begin + i) * factor);
    if (to == whole) __builtin_memcpy(out + begin, whole, size * sizeof(P));
  }
}

template <class T, bool keeps_exps>
static void vocab_head_rows(const VocabHead& args) {
  parallel_rows(args, [&](int64_t b, float* scratch) {
    const T* logits = (const T*)args.logits + b * args.vocab;
    SoftmaxRow softmax(scratch, args.vocab);
    for_each_tile(logits, args.vocab, [&](int64_t tile, const T* part) {
      softmax.add_tile<keeps_exps>(tile, part, args.inv_temperature);
    });
    softmax.finish(args.inv_temperature);
    const RowNoise noise(*args.seed, args.counter + 3 * b);
    const int64_t token = args.greedy ? likeliest_id(logits, args.vocab, softmax.row_largest)
                                      : draw_id(logits, args.vocab, args.inv_temperature, softmax, noise);
    args.token[b] = token;
    args.logprob[b] = load_one(logits + token) * args.inv_temperature - softmax.lse;
    args.entropy[b] = softmax.entropy;
    if (!keeps_exps) return;
    if (args.unit_p_bf16)
      write_unit_p(softmax, args.vocab, (BFloat16*)args.unit_p + b * args.vocab);
    else
      write_unit_p(softmax, args.vocab, (float*)args.unit_p + b * args.vocab);
  });
}

void vocab_head(const VocabHead& args) {
  if (args.unit_p)
    args.logits_bf16 ? vocab_head_rows<BFloat16, true>(args) : vocab_head_rows<float, true>(args);
  else
    args.logits_bf16 ? vocab_head_rows<BFloat16, false>(args) : vocab_head_rows<float, false>(args);
}

}  // namespace FASTLATENT_ISA
}  // namespace fastlatent
