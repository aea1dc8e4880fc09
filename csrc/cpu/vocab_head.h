// vocab_head after its GEMM: token, log-probability, entropy and p / ||p||_2 of each row of logits.
#pragma once

#include "draw.h"
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

template <class P>
static void write_unit_p(const SoftmaxRow& softmax, int64_t vocab, P* out) {
  const float inv_norm = 1.0f / sqrtf(softmax.total_squares);
  for (int64_t tile = 0; tile < softmax.tiles; tile++) {
    const float factor = softmax.largest[tile] * inv_norm;
    const int64_t begin = tile * kTileSize, size = tile_size(tile, vocab);
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
    int64_t token;
    if (args.greedy) {
      token = likeliest_id(logits, args.vocab, softmax.row_largest);
    } else {
      const int64_t tile = draw_tile(softmax, noise), begin = tile * kTileSize;
      token = begin + draw_in_tile(logits + begin, begin, tile_size(tile, args.vocab), args.inv_temperature, noise);
    }
    args.token[b] = token;
    args.logprob[b] = logprob(load_one(logits + token), args.inv_temperature, softmax.lse);
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
