// What the one-pass vocabulary head knows of a row: its running sums, which are brought down whenever a larger logit
// comes, and the race of two-level Gumbel-max sampling. A CPU compiles it too, so that it is tested where there is no
// GPU. Specified in kernels/fastlatent_kernels/vocab_head/__init__.py.
#pragma once

#include <math.h>

#include "head_tile.h"

namespace fastlatent {

constexpr float kInfinity = INFINITY;

FASTLATENT_BOTH float gumbel(const RowNoise& noise, uint32_t index) { return -logf(-logf(noise.uniform(index))); }

// Sums over ids of e = exp(logit - largest), its square, and e * (logit - largest).
struct ExpSums {
  float mass = 0, squares = 0, slope = 0;

  // The exp of a logit relative to `largest`; -inf has none, whatever the largest is.
  FASTLATENT_BOTH float add(float logit, float largest) {
    const float x = logit - (largest == -kInfinity ? 0.0f : largest), e = expf(x);
    mass += e;
    squares += e * e;
    slope += e == 0.0f ? 0.0f : e * x;
    return e;
  }
};

// What the ids of one cluster come to, for one row.
struct RowPart {
  float largest = -kInfinity;
  ExpSums sums;
  float race = -kInfinity;  // of the noise tile that leads
  int32_t tile = -1;

  // Bring the sums down to a larger logit; returns the factor that all summed before must be multiplied with.
  FASTLATENT_BOTH float raise(float logit) {
    if (!(logit > largest)) return 1.0f;  // nor for NaN, which exp hands on to the sums
    const float step = largest - logit, factor = expf(step);
    // before the first, 0 times -inf would be NaN
    sums.slope = factor == 0.0f ? 0.0f * sums.mass : factor * (sums.slope + sums.mass * step);
    sums.mass *= factor;
    sums.squares *= factor * factor;
    largest = logit;
    return factor;
  }

  FASTLATENT_BOTH void add(const ExpSums& more) {
    sums.mass += more.mass;
    sums.squares += more.squares;
    sums.slope += more.slope;
  }

  // Whether a tile takes the lead. The first does whatever its score, so that there is always a tile, NaN or not.
  FASTLATENT_BOTH bool leads(int32_t challenger, float score) {
    if (tile >= 0 && !(score > race)) return false;
    race = score;
    tile = challenger;
    return true;
  }
};

// What the noise tile that is being read comes to, relative to the row's largest logit at the time.
struct TileSums {
  float largest = -kInfinity, mass = 0;

  FASTLATENT_BOTH void add(float factor, float logit, float more) {
    largest = logit > largest ? logit : largest;
    mass = mass * factor + more;
  }
  FASTLATENT_BOTH float score(float row_largest, bool greedy, const RowNoise& noise, int64_t tile) const {
    return greedy ? largest : row_largest + logf(mass) + gumbel(noise, (uint32_t)tile);
  }
};

// A row of all clusters: the parts lie `stride` apart.
struct Row {
  float largest = -kInfinity;
  ExpSums sums;
  int64_t leader = 0;  // cluster of the leading tile, the first among equals

  FASTLATENT_BOTH Row(const RowPart* part, int64_t clusters, int64_t stride) {
    for (int64_t c = 0; c < clusters; c++) {
      const RowPart& of = part[c * stride];
      largest = of.largest > largest ? of.largest : largest;
      if (of.race > part[leader * stride].race) leader = c;
    }
    for (int64_t c = 0; c < clusters; c++) {
      const RowPart& of = part[c * stride];
      const float f = factor(of), step = of.largest - largest;
      sums.mass += f * of.sums.mass;
      sums.squares += f * f * of.sums.squares;
      sums.slope += f == 0.0f ? 0.0f * of.sums.mass : f * (of.sums.slope + of.sums.mass * step);
    }
  }

  FASTLATENT_BOTH float factor(const RowPart& of) const {
    return expf(of.largest - (largest == -kInfinity ? 0.0f : largest));
  }
  FASTLATENT_BOTH float logprob(float logit) const { return logit - largest - logf(sums.mass); }
  FASTLATENT_BOTH float entropy() const { return logf(sums.mass) - sums.slope / sums.mass; }
  // of a cluster's part of the mixture, whose ids were weighed with exps relative to its own largest logit
  FASTLATENT_BOTH float weight(const RowPart& of) const { return factor(of) / sqrtf(sums.squares); }
};

// The id inside a tile, by its place: the largest logit + Gumbel, the lowest among equals.
struct PlaceRace {
  float score = -kInfinity;
  int place = 0;

  FASTLATENT_BOTH void challenge(float other, int at) {
    if (!(other > score || (other == score && at < place))) return;
    score = other;
    place = at;
  }
  FASTLATENT_BOTH void run(int at, float logit, int64_t id, bool greedy, const RowNoise& noise) {
    challenge(greedy ? logit : logit + gumbel(noise, (uint32_t)id), at);
  }
};

}  // namespace fastlatent
