// One pass over a row of logits, tile by tile: what sampling, entropy and the mixture need of its softmax.
#pragma once

#include "../structs.h"
#include "philox.h"
#include "simd.h"

namespace fastlatent {
namespace FASTLATENT_ISA {

// Sums over one tile relative to its own largest logit.
struct TileSums {
  float largest;  // unscaled logit
  float mass;     // sum of exps
  float squares;  // sum of exps^2
  float slope;    // sum of exps * (l - largest l)
};

// Sums of a tile; where `keeps_exps` also exps[128] = exp(l - largest l).
template <bool keeps_exps, class T>
static inline TileSums sum_tile(const T* logits, float inv_temperature, float* exps) {
  floats top = load(logits);
  for (int i = kLanes; i < kTileSize; i += kLanes) top = larger(top, load(logits + i));
  const float largest = largest_lane(top);
  // a tile of nothing but -inf: any finite shift makes its exps 0 instead of NaN
  const float shift = largest == -kInfinity ? 0.0f : largest;
  floats s = {}, q = {}, w = {};
  for (int i = 0; i < kTileSize; i += kLanes) {
    // -88: exp is 0 there already, and 0 * -inf would not be. In this order a NaN stays one, and `w` shows it
    const floats x = larger(splat(-88.0f), (load(logits + i) - shift) * inv_temperature);
    const floats e = exp_negative(x);
    if (keeps_exps) store(exps + i, e);
    s += e;
    q += e * e;
    w += e * x;
  }
  return {largest, sum_lanes(s), sum_lanes(q), sum_lanes(w)};
}

// The sums of every tile of a row, [tiles] each; `finish` makes `mass` relative to the row's largest logit.
struct SoftmaxRow {
  int64_t tiles;
  float* exps;  // [tiles * 128]; written where `keeps_exps`
  float *largest, *mass, *squares, *slope;
  float row_largest = -kInfinity;  // unscaled
  float total = 0, total_squares = 0, entropy = 0, lse = 0;

  SoftmaxRow(float* exps, float* sums, int64_t tiles)
      : tiles(tiles), exps(exps), largest(sums), mass(sums + tiles), squares(sums + 2 * tiles),
        slope(sums + 3 * tiles) {}

  SoftmaxRow(float* scratch, int64_t vocab) : SoftmaxRow(scratch, scratch + num_tiles(vocab) * kTileSize, num_tiles(vocab)) {}

  template <bool keeps_exps, class T>
  void add_tile(int64_t tile, const T* logits, float inv_temperature) {
    const TileSums sums = sum_tile<keeps_exps>(logits, inv_temperature, exps + tile * kTileSize);
    row_largest = sums.largest > row_largest ? sums.largest : row_largest;
    set_tile(tile, sums);
  }

  void set_tile(int64_t tile, const TileSums& sums) {
    largest[tile] = sums.largest;
    mass[tile] = sums.mass;
    squares[tile] = sums.squares;
    slope[tile] = sums.slope;
  }

  // Bring every tile to the row's largest logit; `largest` becomes the factor exp(l_tile - l_row) of each tile's exps.
  void finish(float inv_temperature) {
    float total_slope = 0;
    for (int64_t c = 0; c < tiles; c++) {
      const float x = largest[c] == -kInfinity ? -kInfinity : (largest[c] - row_largest) * inv_temperature;
      const float factor = expf(x);
      total_slope += factor == 0 ? 0 * slope[c] : (slope[c] + mass[c] * x) * factor;
      total_squares += squares[c] * factor * factor;
      total += mass[c] *= factor;
      largest[c] = factor;
    }
    if (total_slope != total_slope) total = total_squares = total_slope;  // a logit is NaN, which exps do not show
    entropy = logf(total) - total_slope / total;
    // fmaf, here and in `logprob`: where a compiler fuses as it likes, two functions that share this differ in the last bit
    lse = __builtin_fmaf(row_largest, inv_temperature, logf(total));
  }
};

// Log-probability of a logit of the row.
static inline float logprob(float logit, float inv_temperature, float lse) {
  return __builtin_fmaf(logit, inv_temperature, -lse);
}

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
