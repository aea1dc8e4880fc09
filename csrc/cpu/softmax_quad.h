// The sums of `softmax_row.h` tile after tile for the four rows of a quad at once: a vector has four ids of each row.
#pragma once

#include <immintrin.h>

#include "bf16_dot.h"
#include "softmax_row.h"

namespace fastlatent {
namespace FASTLATENT_ISA {

// 2^x for x <= 0, relative error below 2e-7; 0 below -150. The reduction and the last step take no multiplication.
static inline floats exp2_negative(floats x) {
  const floats n = (floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const floats r = x - n;
  floats p = splat(1.32647287e-3f);  // least relative error on [-1/2, 1/2] of those that are 1 at 0
  p = p * r + 9.67151318e-3f;
  p = p * r + 5.55073374e-2f;
  p = p * r + 2.40222421e-1f;
  p = p * r + 6.93146978e-1f;
  p = p * r + 1.0f;
  return (floats)_mm512_scalef_ps((__m512)p, (__m512)n);
}

// The four lanes of each row combined, in all of them.
template <class Combine>
static inline floats within_rows(floats v, Combine combine) {
  v = combine(v, (floats)_mm512_permute_ps((__m512)v, 0x4E));
  return combine(v, (floats)_mm512_permute_ps((__m512)v, 0xB1));
}

// Sums over the tiles so far, relative to their largest logit; those of exps are spread over a row's four lanes.
struct QuadSums {
  floats largest = splat(-kInfinity), mass = {}, squares = {}, slope = {};  // slope: base 2

  struct Added {
    floats shrink;  // what sums so far were multiplied by
    floats mass;    // the tile's, relative to the new `largest`
  };

  // Takes a tile in; where `keeps_exps` its p = exp(l - largest) too.
  template <bool keeps_exps>
  Added add(const float* logits, float inv_temperature, BFloat16* p) {
    floats top = load(logits);
    for (int i = kLanes; i < kQuadTile; i += kLanes) top = larger(top, load(logits + i));
    top = larger(within_rows(top, [](floats a, floats b) { return larger(a, b); }), largest);
    // nothing but -inf so far: any finite shift makes exps 0 instead of NaN
    const floats shift = top == splat(-kInfinity) ? floats{} : top;
    const float scale = inv_temperature * 1.44269504088896341f;
    // -150: 2^x is 0 there already, and 0 * -inf would not be. In this order a NaN stays one, and `slope` shows it
    const auto relative = [&](floats l) { return larger(splat(-150.0f), (l - shift) * scale); };
    const floats moved = relative(largest), shrink = exp2_negative(moved);
    floats s = {}, q = {}, w = {};
    for (int i = 0; i < kQuadTile; i += kLanes) {
      const floats x = relative(load(logits + i)), e = exp2_negative(x);
      if (keeps_exps) {
        const __m256bh rounded = _mm512_cvtneps_pbh((__m512)e);
        __builtin_memcpy(p + i, &rounded, sizeof rounded);
      }
      s += e;
      q += e * e;
      w += e * x;
    }
    slope = (slope + mass * moved) * shrink + w;
    squares = squares * (shrink * shrink) + q;
    mass = mass * shrink + s;
    largest = top;
    return {shrink, total(s)};
  }

  TileSums row(int r) const {
    return {largest[4 * r], total(mass)[4 * r], total(squares)[4 * r], total(slope)[4 * r] * 0.693147180559945309f};
  }

  static floats total(floats v) { return within_rows(v, [](floats a, floats b) { return a + b; }); }
};

}  // namespace FASTLATENT_ISA
}  // namespace fastlatent
