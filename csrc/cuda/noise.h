// The noise of a rollout, which a CPU compiles too: Philox4x32-10 addressed as noise.py says, (index,
// position * 4 + stream, prompt, step * 2^16 + sample).
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define FASTLATENT_BOTH __host__ __device__ __forceinline__
#else
#define FASTLATENT_BOTH inline
#endif

namespace fastlatent {

enum Stream : uint32_t { kStreamTile = 0, kStreamId = 1, kStreamLatent = 2 };

struct RowNoise {
  uint32_t key0 = 0, key1 = 0, address = 0, prompt = 0, sample_word = 0;

  RowNoise() = default;  // no noise is drawn
  FASTLATENT_BOTH RowNoise(int64_t seed, const int64_t* counter, Stream stream)
      : key0((uint32_t)seed), key1((uint32_t)((uint64_t)seed >> 32)), address((uint32_t)counter[0] * 4 + stream),
        prompt((uint32_t)counter[1]), sample_word((uint32_t)counter[2]) {}

  FASTLATENT_BOTH float uniform(uint32_t index) const {
    uint32_t c0 = index, c1 = address, c2 = prompt, c3 = sample_word, k0 = key0, k1 = key1;
    for (int round = 0; round < 10; round++) {
      const uint64_t p0 = (uint64_t)c0 * 0xD2511F53u, p1 = (uint64_t)c2 * 0xCD9E8D57u;
      c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
      c1 = (uint32_t)p1;
      c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
      c3 = (uint32_t)p0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return ((float)(c0 >> 9) + 0.5f) * 0x1p-23f;
  }
};

}  // namespace fastlatent
