// Philox4x32-10 and the exponential noise of Gumbel-max sampling; the contract is in noise.py.
#pragma once

#include <math.h>
#include <stdint.h>

namespace fastlatent {
namespace FASTLATENT_ISA {

enum Stream : uint32_t { kStreamTile = 0, kStreamId = 1, kStreamLatent = 2 };

struct RowNoise {
  uint32_t key0, key1, position, prompt, sample_word;

  RowNoise(int64_t seed, const int64_t* counter)
      : key0((uint32_t)seed), key1((uint32_t)((uint64_t)seed >> 32)), position((uint32_t)counter[0]),
        prompt((uint32_t)counter[1]), sample_word((uint32_t)counter[2]) {}

  // -log(u) for 16 indices: the argmax of mass / -log(u) is that of log(mass) - log(-log u), one logarithm fewer
  void exponential(const uint32_t* index, Stream stream, float* out) const {
    constexpr int n = 16;
    uint32_t c0[n], c1[n], c2[n], c3[n];
    uint32_t k0 = key0, k1 = key1;
    for (int i = 0; i < n; i++) {
      c0[i] = index[i];
      c1[i] = position * 4 + stream;
      c2[i] = prompt;
      c3[i] = sample_word;
    }
    for (int round = 0; round < 10; round++) {
      for (int i = 0; i < n; i++) {
        const uint64_t p0 = (uint64_t)c0[i] * 0xD2511F53u, p1 = (uint64_t)c2[i] * 0xCD9E8D57u;
        c0[i] = (uint32_t)(p1 >> 32) ^ c1[i] ^ k0;
        c1[i] = (uint32_t)p1;
        c2[i] = (uint32_t)(p0 >> 32) ^ c3[i] ^ k1;
        c3[i] = (uint32_t)p0;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < n; i++) out[i] = -logf(((float)(int32_t)(c0[i] >> 9) + 0.5f) * 0x1p-23f);
  }
};

}  // namespace FASTLATENT_ISA
}  // namespace fastlatent
