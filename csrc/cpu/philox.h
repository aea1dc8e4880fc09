// Philox4x32-10 and the exponential noise of Gumbel-max sampling; the contract is in noise.py.
#pragma once

#include <math.h>
#include <stdint.h>

#include "simd.h"

namespace fastlatent {
namespace FASTLATENT_ISA {

enum Stream : uint32_t { kStreamTile = 0, kStreamId = 1, kStreamLatent = 2 };

// Both halves of the lanes' products. GCC vectorizes neither a loop of such products nor one of either half.
struct Products {
  words low, high;

  Products(words x, uint32_t factor) {
    typedef uint64_t longs __attribute__((vector_size(sizeof x)));  // of two lanes the even one is the low half
    const longs whole = (longs)x, low_half = longs{} + 0xFFFFFFFFu;
    const longs even = (whole & low_half) * factor, odd = (whole >> 32) * factor;
    low = (words)((even & low_half) | odd << 32);
    high = (words)(even >> 32 | (odd & ~low_half));
  }
};

struct RowNoise {
  uint32_t key0, key1, position, prompt, sample_word;

  RowNoise(int64_t seed, const int64_t* counter)
      : key0((uint32_t)seed), key1((uint32_t)((uint64_t)seed >> 32)), position((uint32_t)counter[0]),
        prompt((uint32_t)counter[1]), sample_word((uint32_t)counter[2]) {}

  // -log(u) for 16 indices: the argmax of mass / -log(u) is that of log(mass) - log(-log u), one logarithm fewer
  void exponential(const uint32_t* index, Stream stream, float* out) const {
    constexpr int n = 16;
    uint32_t bits[n];
    for (int i = 0; i < n; i += kLanes) {
      words c0, c1 = words{} + (position * 4 + stream), c2 = words{} + prompt, c3 = words{} + sample_word;
      __builtin_memcpy(&c0, index + i, sizeof c0);
      uint32_t k0 = key0, k1 = key1;
      for (int round = 0; round < 10; round++) {
        const Products p0(c0, 0xD2511F53u), p1(c2, 0xCD9E8D57u);
        c0 = p1.high ^ c1 ^ k0;
        c1 = p1.low;
        c2 = p0.high ^ c3 ^ k1;
        c3 = p0.low;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
      }
      __builtin_memcpy(bits + i, &c0, sizeof c0);
    }
    for (int i = 0; i < n; i++) out[i] = -logf(((float)(int32_t)(bits[i] >> 9) + 0.5f) * 0x1p-23f);
  }
};

}  // namespace FASTLATENT_ISA
}  // namespace fastlatent
