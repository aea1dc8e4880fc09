// The sums of `softmax_row.h` over one tile for the four rows of a quad at once: a vector has four ids of each row.
#pragma once

#include <immintrin.h>

#include "bf16_dot.h"
#include "softmax_row.h"

namespace fastlatent {
namespace FASTLATENT_ISA {

struct QuadSums {  // as TileSums, a row's number in its four lanes
  floats largest, mass, squares, slope;

  TileSums row(int r) const { return {largest[4 * r], mass[4 * r], squares[4 * r], slope[4 * r]}; }
};

// The four lanes of each row combined, in all of them.
template <class Combine>
static inline floats within_rows(floats v, Combine combine) {
  v = combine(v, (floats)_mm512_permute_ps((__m512)v, 0x4E));
  return combine(v, (floats)_mm512_permute_ps((__m512)v, 0xB1));
}

// Sums of a tile; where `keeps_exps` its logits become exp(l - largest l).
template <bool keeps_exps>
static inline QuadSums sum_quad(float* logits, float inv_temperature) {
  const auto add = [](floats a, floats b) { return a + b; };
  floats top = load(logits);
  for (int i = kLanes; i < kQuadTile; i += kLanes) top = larger(top, load(logits + i));
  const floats largest = within_rows(top, [](floats a, floats b) { return larger(a, b); });
  // a tile of nothing but -inf: any finite shift makes its exps 0 instead of NaN
  const floats shift = largest == splat(-kInfinity) ? floats{} : largest;
  floats s = {}, q = {}, w = {};
  for (int i = 0; i < kQuadTile; i += kLanes) {
    // -88: exp is 0 there already, and 0 * -inf would not be. In this order a NaN stays one, and `w` shows it
    const floats x = larger(splat(-88.0f), (load(logits + i) - shift) * inv_temperature);
    const floats e = exp_negative(x);
    if (keeps_exps) store(logits + i, e);
    s += e;
    q += e * e;
    w += e * x;
  }
  return {largest, within_rows(s, add), within_rows(q, add), within_rows(w, add)};
}

// exp of the difference of two logits, 0 for -inf
static inline floats relative(floats logit, floats largest, float inv_temperature) {
  return logit == splat(-kInfinity) ? floats{} : exp_negative((logit - largest) * inv_temperature);
}

static inline float relative(float logit, float largest, float inv_temperature) {
  return logit == -kInfinity ? 0.0f : expf((logit - largest) * inv_temperature);
}

}  // namespace FASTLATENT_ISA
}  // namespace fastlatent
