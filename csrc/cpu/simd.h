// Vectors of FASTLATENT_LANES floats for whichever instruction set this unit is compiled for.
//
// GCC and Clang vector extensions only, and no inline function of the standard library: its code would be compiled
// here with this unit's flags and might be the copy the linker keeps for processors without them.
#pragma once

#include <stdint.h>

namespace fastlatent {
namespace FASTLATENT_ISA {

constexpr int kLanes = FASTLATENT_LANES;
constexpr float kInfinity = __builtin_inff();

typedef float floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t halves __attribute__((vector_size(kLanes * 2)));

struct BFloat16 {
  uint16_t bits;
};

static inline floats splat(float x) { return x - floats{}; }

static inline floats load(const float* from) {
  floats v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

static inline floats load(const BFloat16* from) {
  halves h;
  __builtin_memcpy(&h, from, sizeof h);
  return (floats)(__builtin_convertvector(h, words) << 16);
}

static inline float load_one(const float* from) { return *from; }

static inline float load_one(const BFloat16* from) {
  const uint32_t word = (uint32_t)from->bits << 16;
  float x;
  __builtin_memcpy(&x, &word, sizeof x);
  return x;
}

static inline void store(float* to, floats v) { __builtin_memcpy(to, &v, sizeof v); }

// rounds to nearest even; the caller stores no NaN
static inline void store(BFloat16* to, floats v) {
  words w = (words)v;
  w = (w + 0x7FFF + ((w >> 16) & 1)) >> 16;
  const halves h = __builtin_convertvector(w, halves);
  __builtin_memcpy(to, &h, sizeof h);
}

// Loads and stores of the first n lanes of a vector.
template <class T>
static inline floats load_some(const T* from, int64_t n) {
  if (n >= kLanes) return load(from);
  T lanes[kLanes] = {};
  __builtin_memcpy(lanes, from, n * sizeof(T));
  return load((const T*)lanes);
}

template <class T>
static inline void store_some(T* to, floats v, int64_t n) {
  if (n >= kLanes) return store(to, v);
  T lanes[kLanes];
  store((T*)lanes, v);
  __builtin_memcpy(to, lanes, n * sizeof(T));
}

static inline floats larger(floats a, floats b) { return a > b ? a : b; }

typedef float quad __attribute__((vector_size(16)));

// The lanes brought down to four by halves, which takes fewer steps than one after the other.
template <class Combine>
static inline quad fold(floats v, Combine combine) {
  quad part[kLanes / 4];
  __builtin_memcpy(part, &v, sizeof v);
  for (int n = kLanes / 8; n; n /= 2)
    for (int i = 0; i < n; i++) part[i] = combine(part[i], part[i + n]);
  return part[0];
}

static inline float largest_lane(floats v) {
  const quad x = fold(v, [](quad a, quad b) { return a > b ? a : b; });
  const float even = x[0] > x[2] ? x[0] : x[2], odd = x[1] > x[3] ? x[1] : x[3];
  return even > odd ? even : odd;
}

static inline float sum_lanes(floats v) {
  const quad x = fold(v, [](quad a, quad b) { return a + b; });
  return (x[0] + x[2]) + (x[1] + x[3]);
}

// exp for x <= 0, relative error below 2e-7; 0 below -87, where a float is about to become subnormal
static inline floats exp_negative(floats x) {
  const floats lowest = splat(-87.0f);
  const ints under = x < lowest;
  x = larger(x, lowest);
  const floats rounder = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number, kept in the low bits
  floats n = x * 1.44269504088896341f + rounder;
  const ints exponent = (ints)n << 23;
  n -= rounder;
  const floats r = (x - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;  // ln 2 in two parts
  floats p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return (floats)(((ints)p + exponent) & ~under);
}

}  // namespace FASTLATENT_ISA
}  // namespace fastlatent
