// One pass over a row of logits, tile by tile: what sampling, entropy and the mixture need of its softmax.
#pragma once

#include "../structs.h"
#include "philox.h"
#include "simd.h"

namespace fastlatent {
namespace FASTLATENT_ISA {

// Sums over one tile relative to its own largest logit; `finish` makes `mass` relative to the row's.
struct SoftmaxRow {
  int64_t tiles;
  float* exps;      // [tiles * 128], exp(l - tile's largest l); written where `keeps_exps`
  float* largest;   // [tiles], unscaled logit
  float* mass;      // [tiles], sum of exps
  float* squares;   // [tiles], sum of exps^2
  float* slope;     // [tiles], sum of exps * (l - largest l)
  float row_largest = -kInfinity;  // unscaled
  float total = 0, total_squares = 0, entropy = 0, lse = 0;

  SoftmaxRow(float* scratch, int64_t vocab)
      : tiles((vocab + kTileSize - 1) / kTileSize), exps(scratch), largest(scratch + tiles * kTileSize),
        mass(largest + tiles), squares(mass + tiles), slope(squares + tiles) {}

  template <bool keeps_exps, class T>
  void add_tile(int64_t tile, const T* logits, float inv_temperature) {
    floats top = load(logits);
    for (int i = kLanes; i < kTileSize; i += kLanes) top = larger(top, load(logits + i));
    const float shift = largest_lane(top);
    row_largest = shift > row_largest ? shift : row_largest;
    // a tile of nothing but -inf: any finite shift makes its exps 0 instead of NaN
    const float finite_shift = shift == -kInfinity ? 0.0f : shift;
    floats s = {}, q = {}, w = {};
    for (int i = 0; i < kTileSize; i += kLanes) {
      // -88: exp is 0 there already, and 0 * -inf would not be
      const floats x = larger((load(logits + i) - finite_shift) * inv_temperature, splat(-88.0f));
      const floats e = exp_negative(x);
      if (keeps_exps) store(exps + tile * kTileSize + i, e);
      s += e;
      q += e * e;
      w += e * x;
    }
    largest[tile] = shift;
    mass[tile] = sum_lanes(s);
    squares[tile] = sum_lanes(q);
    slope[tile] = sum_lanes(w);
  }

  // Bring every tile to the row's largest logit; `largest` becomes the factor exp(l_tile - l_row) of each tile's exps.
  void finish(float inv_temperature) {
    float total_slope = 0;
    for (int64_t c = 0; c < tiles; c++) {
      const float x = largest[c] == -kInfinity ? -kInfinity : (largest[c] - row_largest) * inv_temperature;
      const float factor = expf(x);
      total_slope += factor == 0 ? 0 : (slope[c] + mass[c] * x) * factor;
      total_squares += squares[c] * factor * factor;
      total += mass[c] *= factor;
      largest[c] = factor;
    }
    entropy = logf(total) - total_slope / total;
    lse = row_largest * inv_temperature + logf(total);
  }
};

// Calls `visit(tile, logits of that tile)` for each tile, the last one filled up with -inf.
template <class T, class Visit>
static inline void for_each_tile(const T* logits, int64_t vocab, Visit visit) {
  const int64_t whole = vocab / kTileSize;
  for (int64_t tile = 0; tile < whole; tile++) visit(tile, logits + tile * kTileSize);
  if (const int64_t rest = vocab % kTileSize) {
    T last[kTileSize];
    const floats nothing = splat(-kInfinity);
    for (int i = 0; i < kTileSize; i += kLanes) store(last + i, nothing);
    __builtin_memcpy(last, logits + whole * kTileSize, rest * sizeof(T));
    visit(whole, (const T*)last);
  }
}

}  // namespace FASTLATENT_ISA
}  // namespace fastlatent
