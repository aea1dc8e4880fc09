// topk_gumbel: the k best of each row's candidates under clipped Gumbel noise, drawn only for those that can win.
#pragma once

#include "parallel_rows.h"
#include "softmax_row.h"
#include "topk_mixture.h"

namespace fastlatent {
namespace FASTLATENT_ISA {

// Integers in the order of the floats; -0.0 and 0.0 are equal.
static int32_t ordered(float x) {
  int32_t bits;
  x = x == 0 ? 0.0f : x;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

static float from_ordered(int32_t word) {
  float x;
  word ^= (word >> 31) & 0x7FFFFFFF;
  __builtin_memcpy(&x, &word, sizeof x);
  return x;
}

// The candidates are the ids before or at (value, id) in the order: larger logit, then lower id.
struct Candidates {
  float value = -kInfinity;
  int64_t id = -1, count = 0;
  double mass = 0;  // sum of exp((l - largest l) / T)

  bool has(float x, int64_t v) const { return x > value || (x == value && v <= id); }
};

template <class T>
struct GumbelRow {
  const TopkGumbel& args;
  const T* logits;
  SoftmaxRow softmax;     // its exps relative to the row's largest logit
  float* tile_largest;    // [tiles]
  TopK likeliest;
  double mass = 0;

  GumbelRow(const TopkGumbel& args, int64_t row, float* scratch)
      : args(args), logits((const T*)args.logits + row * args.vocab), softmax(scratch, args.vocab),
        tile_largest(softmax.squares), likeliest(args.top_k) {
    for_each_tile(logits, args.vocab, [&](int64_t tile, const T* part) {
      softmax.add_tile<true>(tile, part, args.inv_temperature);
      if (!likeliest.takes(softmax.largest[tile])) return;
      const int64_t begin = tile * kTileSize;
      for (int i = 0; i < kTileSize && begin + i < args.vocab; i++)
        if (likeliest.takes(load_one(part + i))) likeliest.add(load_one(part + i), begin + i);
    });
    softmax.finish(args.inv_temperature);
    // `largest` now holds factors, and the sums of squares are not used
    for_each_tile(logits, args.vocab, [&](int64_t tile, const T* part) {
      floats top = load(part);
      for (int i = 0; i < kTileSize; i += kLanes) {
        float* exps = softmax.exps + tile * kTileSize + i;
        top = larger(top, load(part + i));
        store(exps, load(exps) * softmax.largest[tile]);
      }
      tile_largest[tile] = largest_lane(top);
      mass += softmax.mass[tile];
    });
  }

  double mass_above(float threshold) const {
    double total = 0;
    const floats limit = splat(threshold);
    for_each_tile(logits, args.vocab, [&](int64_t tile, const T* part) {
      if (!(tile_largest[tile] > threshold)) return;
      floats sum = {};
      for (int i = 0; i < kTileSize; i += kLanes)
        sum += (floats)((ints)load(softmax.exps + tile * kTileSize + i) & (load(part + i) > limit));
      total += sum_lanes(sum);
    });
    return total;
  }

  // The longer of the nucleus and the k likeliest.
  Candidates candidates() const {
    Candidates found;
    int64_t wanted_ties = 0;
    float share = 0;
    if (args.top_p < 1) {
      // bfloat16 as float32 ends in 16 equal bits, and is searched without them
      const int shift = args.logits_bf16 ? 16 : 0;
      const double wanted = args.top_p * mass;
      // what lies at or below it weighs at most 1 - top_p of the row; 0.01: whatever is rounded
      const double lowest = log(mass) + log((1 - (double)args.top_p) / (double)args.vocab) - 0.01;
      int64_t low = (ordered(likeliest.logit[0] + (float)lowest / args.inv_temperature) >> shift) - 1;
      int64_t high = ordered(likeliest.logit[0]) >> shift;
      while (high - low > 1) {
        const int64_t middle = (low + high) >> 1;
        const double above = mass_above(value_of(middle, shift));
        if (above < wanted)
          high = middle, found.mass = above;
        else
          low = middle;
      }
      found.value = value_of(high, shift);
      share = expf((found.value - likeliest.logit[0]) * args.inv_temperature);
      wanted_ties = (int64_t)fmin(ceil((wanted - found.mass) / share), (double)args.vocab);
    } else {
      found.mass = mass;
    }
    int64_t ties = 0;
    for_each_tile(logits, args.vocab, [&](int64_t tile, const T* part) {
      if (tile_largest[tile] < found.value) return;
      for (int i = 0; i < kTileSize; i++) {
        found.count += load_one(part + i) > found.value;
        if (load_one(part + i) == found.value && ties < wanted_ties) ties++, found.id = tile * kTileSize + i;
      }
    });
    found.count += ties;
    found.mass += (double)ties * share;
    return found.count < args.top_k ? k_likeliest() : found;
  }

  Candidates k_likeliest() const {
    Candidates found;
    for (int i = 0; i < args.top_k && likeliest.logit[i] > -kInfinity; i++) {
      found.value = likeliest.logit[i], found.id = likeliest.id[i], found.count++;
      found.mass += expf((likeliest.logit[i] - likeliest.logit[0]) * args.inv_temperature);
    }
    return found;
  }

  TopK winners(const Candidates& candidates, const RowNoise& noise) const {
    constexpr int n = 16;
    TopK best(args.top_k);
    const float last = likeliest.logit[args.top_k - 1], temperature = 1 / args.inv_temperature;
    // 0 times an infinite width is 0 here
    const float width = args.scale > 0 ? args.scale * (args.high - args.low) : 0;
    // noise lies in an interval; the rest is room for rounding, for what is kept beyond need still has to win. A row with
    // a NaN has no order to prune by, and k ids must be found all the same
    const float least = last == -kInfinity || softmax.lse != softmax.lse ? -kInfinity
        : last - width * temperature - 1e-5f * (fabsf(likeliest.logit[0]) + fabsf(last) + (16 + width) * temperature);
    for_each_tile(logits, args.vocab, [&](int64_t tile, const T* part) {
      if (tile_largest[tile] < least) return;
      for (int first = 0; first < kTileSize; first += n) {
        uint32_t index[n];
        float race[n], x[n], top = -kInfinity;
        for (int i = 0; i < n; i++) {
          index[i] = (uint32_t)(tile * kTileSize + first + i);
          x[i] = load_one(part + first + i);
          top = x[i] > top ? x[i] : top;
        }
        if (top < least) continue;
        noise.exponential(index, kStreamLatent, race);
        for (int i = 0; i < n && index[i] < args.vocab; i++) {
          const float score = x[i] > -kInfinity && candidates.has(x[i], index[i]) ? noisy(x[i], race[i]) : -kInfinity;
          if (best.takes(score)) best.add(score, index[i]);
        }
      }
    });
    return best;
  }

  float noisy(float x, float race) const {
    const float clipped = fminf(fmaxf(-logf(race), args.low), args.high);
    return (x * args.inv_temperature - softmax.lse) + args.scale * (clipped + args.shift);
  }

  static float value_of(int64_t word, int shift) {
    const int64_t low_bits = word < 0 ? ((int64_t)1 << shift) - 1 : 0;
    return from_ordered((int32_t)(word * ((int64_t)1 << shift) + low_bits));
  }
};

template <class T>
static void topk_gumbel_rows(const TopkGumbel& args) {
  parallel_rows(args, [&](int64_t b, float* scratch) {
    const GumbelRow<T> row(args, b, scratch);
    const Candidates candidates = row.candidates();
    const TopK best = row.winners(candidates, RowNoise(*args.seed, args.counter + 3 * b));
    const float unknown = row.softmax.lse - row.softmax.lse;  // 0; NaN where a logit is, or all tokens are forbidden
    float total = 0;
    for (int i = 0; i < args.top_k; i++) {
      const int64_t at = b * args.top_k + i;
      args.ids[at] = best.id[i];
      args.score[at] = best.logit[i] + unknown;
      args.logprob[at] = logprob(load_one(row.logits + best.id[i]), args.inv_temperature, row.softmax.lse);
      total += args.weights[at] = expf((best.logit[i] - best.logit[0]) * args.inv_mixture_temperature);
    }
    for (int i = 0; i < args.top_k; i++) args.weights[b * args.top_k + i] /= total;
    args.token[b] = row.likeliest.id[0];
    const float log_kept = (float)log(candidates.mass / row.mass);
    args.log_kept[b] = (log_kept > 0 ? 0.0f : log_kept) + unknown;
    args.num_candidates[b] = candidates.count;
    args.entropy[b] = row.softmax.entropy;
  });
}

void topk_gumbel(const TopkGumbel& args) {
  args.logits_bf16 ? topk_gumbel_rows<BFloat16>(args) : topk_gumbel_rows<float>(args);
}

}  // namespace FASTLATENT_ISA
}  // namespace fastlatent
