// Two-level Gumbel-max sampling of a row: the tile, then the id inside it, with the largest mass / -log(u).
#pragma once

#include "softmax_row.h"

namespace fastlatent {
namespace FASTLATENT_ISA {

constexpr int kRaces = 16;

// -log(u) of kRaces tiles.
static inline void tile_races(const RowNoise& noise, int64_t first, float* race) {
  uint32_t index[kRaces];
  for (int i = 0; i < kRaces; i++) index[i] = (uint32_t)(first + i);
  noise.exponential(index, kStreamTile, race);
}

static inline int64_t draw_tile(const SoftmaxRow& softmax, const RowNoise& noise) {
  float race[kRaces];
  int64_t tile = 0;
  float best = -1;
  for (int64_t first = 0; first < softmax.tiles; first += kRaces) {
    tile_races(noise, first, race);
    for (int i = 0; i < kRaces && first + i < softmax.tiles; i++) {
      const float score = softmax.mass[first + i] / race[i];
      if (score > best) best = score, tile = first + i;
    }
  }
  return tile;
}

// Place in a tile, of the `size` ids from `begin` on, whose logits these are.
template <class T>
static int64_t draw_in_tile(const T* logits, int64_t begin, int64_t size, float inv_temperature, const RowNoise& noise) {
  constexpr int n = 16;
  uint32_t index[n];
  float race[n];
  float shift = -kInfinity;
  for (int64_t i = 0; i < size; i++) shift = load_one(logits + i) > shift ? load_one(logits + i) : shift;
  int64_t place = 0;
  float best = -1;
  for (int64_t first = 0; first < size; first += n) {
    for (int i = 0; i < n; i++) index[i] = (uint32_t)(begin + first + i);
    noise.exponential(index, kStreamId, race);
    for (int i = 0; i < n && first + i < size; i++) {
      const float score = expf((load_one(logits + first + i) - shift) * inv_temperature) / race[i];
      if (score > best) best = score, place = first + i;
    }
  }
  return place;
}

// The draw that is greedy.
static inline int64_t likeliest(const float* logits, int64_t size) {
  int64_t place = 0;
  for (int64_t i = 1; i < size; i++) place = logits[i] > logits[place] ? i : place;
  return place;
}

}  // namespace FASTLATENT_ISA
}  // namespace fastlatent
