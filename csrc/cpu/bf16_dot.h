// The two products of vocab_head over one tile of the vocabulary, by dot products of bfloat16 pairs (AVX512_BF16).
//
// A result is summed in one order, whatever rows it is computed beside. Rows come in blocks of at most kBlockRows.
#pragma once

#include <immintrin.h>

#include "../structs.h"
#include "simd.h"

namespace fastlatent {
namespace FASTLATENT_ISA {

constexpr int kBlockRows = 6;  // with 4 ids or 4 vectors of columns: 24 sums in registers
constexpr int kPairs = 32;     // bfloat16 numbers of a vector

static inline __m512bh load_pairs(const BFloat16* from) { return (__m512bh)_mm512_loadu_si512(from); }

static inline __mmask32 first_of(int64_t n) { return n >= kPairs ? ~(__mmask32)0 : ((__mmask32)1 << n) - 1; }

static inline __m512bh load_pairs(const BFloat16* from, __mmask32 mask) {
  return (__m512bh)_mm512_maskz_loadu_epi16(mask, from);
}

// The lanes of each of four vectors summed.
static inline __m128 sum_lanes_of_four(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  const __m512 cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
  const __m512 low = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
  const __m512 high = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
  const __m512 abcd = low + high;  // in each quarter the four sums over that quarter
  const __m256 half = _mm512_castps512_ps256(abcd) + _mm512_extractf32x8_ps(abcd, 1);
  return _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
}

// Memory that is wanted next, brought into the second level cache while something else is computed.
struct Ahead {
  const char* from = nullptr;
  int64_t bytes = 0;

  // What lies from `begin` to `end` of `n` equal parts.
  Ahead part(int64_t begin, int64_t end, int64_t n) const {
    return {from + begin * bytes / n, end * bytes / n - begin * bytes / n};
  }

  void fetch() const {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, 0, 2);
  }
};

// logits[r, v] = hidden[r] . weight[v] for one block of rows and the ids of a tile; `logits` has 128 columns, of which
// those past the last id are left as anything.
template <int rows>
static void dot_rows(const BFloat16* hidden, const BFloat16* weight, int64_t width, int64_t size, float* logits,
                     Ahead ahead) {
  const int64_t whole = width / kPairs * kPairs;
  const __mmask32 rest = first_of(width - whole);
  for (int64_t v = 0; v < size; v += 4) {
    ahead.part(v, v + 4 < size ? v + 4 : size, size).fetch();
    const BFloat16* w[4];
    for (int c = 0; c < 4; c++) w[c] = weight + (v + c < size ? v + c : size - 1) * width;
    __m512 sum[rows][4];
    for (int r = 0; r < rows; r++)
      for (int c = 0; c < 4; c++) sum[r][c] = _mm512_setzero_ps();
    for (int64_t k = 0; k < whole; k += kPairs) {
      __m512bh x[4];
      for (int c = 0; c < 4; c++) x[c] = load_pairs(w[c] + k);
      for (int r = 0; r < rows; r++) {
        const __m512bh h = load_pairs(hidden + r * width + k);
        for (int c = 0; c < 4; c++) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], h, x[c]);
      }
    }
    if (rest) {
      for (int r = 0; r < rows; r++) {
        const __m512bh h = load_pairs(hidden + r * width + whole, rest);
        for (int c = 0; c < 4; c++) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], h, load_pairs(w[c] + whole, rest));
      }
    }
    for (int r = 0; r < rows; r++)
      _mm_storeu_ps(logits + r * kTileSize + v, sum_lanes_of_four(sum[r][0], sum[r][1], sum[r][2], sum[r][3]));
  }
}

// sum[r, columns] += p[r, v] embed[v, columns] over the ids of a tile, for one block of rows and `groups` times 32
// columns, of which the last `mask` exist. `p` has 128 columns, 0 past the last id; rows of `sum` are `stride` apart.
template <int rows, int groups>
static void add_columns(const BFloat16* p, const BFloat16* embed, int64_t embed_width, int64_t size, __mmask32 mask,
                        float* sum, int64_t stride, Ahead ahead) {
  // pairs of one column from rows v and v + 1 of embed: of the first 16 columns, and of the next
  const __m512i column = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i first = _mm512_or_si512(column, _mm512_slli_epi32(_mm512_add_epi32(column, _mm512_set1_epi32(32)), 16));
  const __m512i next = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  __m512 s[rows][2 * groups];
  for (int r = 0; r < rows; r++)
    for (int g = 0; g < 2 * groups; g++) s[r][g] = _mm512_loadu_ps(sum + r * stride + g * 16);
  for (int64_t v = 0; v < size; v += 2) {
    if (v % 8 == 0) ahead.part(v, v + 8 < size ? v + 8 : size, size).fetch();
    const BFloat16* even = embed + v * embed_width;
    const BFloat16* odd = v + 1 < size ? even + embed_width : even;  // p is 0 there
    for (int g = 0; g < groups; g++) {
      const __mmask32 some = g == groups - 1 ? mask : ~(__mmask32)0;
      const __m512i a = (__m512i)load_pairs(even + g * kPairs, some), b = (__m512i)load_pairs(odd + g * kPairs, some);
      const __m512bh low = (__m512bh)_mm512_permutex2var_epi16(a, first, b);
      const __m512bh high = (__m512bh)_mm512_permutex2var_epi16(a, next, b);
      for (int r = 0; r < rows; r++) {
        int32_t pair;
        __builtin_memcpy(&pair, p + r * kTileSize + v, sizeof pair);
        const __m512bh weight = (__m512bh)_mm512_set1_epi32(pair);
        s[r][2 * g] = _mm512_dpbf16_ps(s[r][2 * g], weight, low);
        s[r][2 * g + 1] = _mm512_dpbf16_ps(s[r][2 * g + 1], weight, high);
      }
    }
  }
  for (int r = 0; r < rows; r++)
    for (int g = 0; g < 2 * groups; g++) _mm512_storeu_ps(sum + r * stride + g * 16, s[r][g]);
}

// `add_columns` over whole groups from `column` on, as many of them at once as leave the sums in registers, then fewer;
// the columns that fill no group come last.
template <int rows, int groups = 12 / rows>
static void add_rows(const BFloat16* p, const BFloat16* embed, int64_t embed_width, int64_t size, float* sum,
                     int64_t stride, Ahead ahead, int64_t column = 0) {
  for (; column + groups * kPairs <= embed_width; column += groups * kPairs) {
    const Ahead part = ahead.part(column, column + groups * kPairs, embed_width);
    add_columns<rows, groups>(p, embed + column, embed_width, size, ~(__mmask32)0, sum + column, stride, part);
  }
  if constexpr (groups > 1) {
    add_rows<rows, groups / 2>(p, embed, embed_width, size, sum, stride, ahead, column);
  } else if (column < embed_width) {
    const __mmask32 rest = first_of(embed_width - column);
    add_columns<rows, 1>(p, embed + column, embed_width, size, rest, sum + column, stride, {});
  }
}

}  // namespace FASTLATENT_ISA
}  // namespace fastlatent
