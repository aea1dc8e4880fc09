// The logits of vocab_head over one tile of the vocabulary, by dot products of bfloat16 pairs (AVX512_BF16).
//
// Four rows of hidden states, a quad, share a vector: eight numbers of each stand side by side. The eight of a weight,
// which need no packing, are broadcast to all four, so that a vector of sums ends as four numbers for each row, whatever
// rows it is computed beside.
#pragma once

#include <immintrin.h>

#include "../structs.h"
#include "ahead.h"
#include "simd.h"

namespace fastlatent {
namespace FASTLATENT_ISA {

constexpr int kQuadRows = VocabHeadBf16::kQuadRows, kChunk = VocabHeadBf16::kChunk;
constexpr int kQuadTile = kQuadRows * kTileSize;  // logits of a quad and a tile: [ids / 4, 4 rows, 4 ids]
constexpr int kBlockQuads = 4;  // quads that are multiplied together: what stays in the first level cache beside weights

static inline int64_t quad_size(int64_t width) { return (width + kChunk - 1) / kChunk * kChunk * kQuadRows; }

// A quad from up to four rows, [chunks, 4 rows, 8 numbers], filled up with zeros.
static void pack_quad(const BFloat16* hidden, int64_t rows, int64_t width, BFloat16* quad) {
  __builtin_memset(quad, 0, quad_size(width) * sizeof(BFloat16));
  for (int64_t r = 0; r < rows; r++)
    for (int64_t k = 0; k < width; k += kChunk) {
      const int64_t n = width - k < kChunk ? width - k : kChunk;
      __builtin_memcpy(quad + k * kQuadRows + r * kChunk, hidden + r * width + k, n * sizeof(BFloat16));
    }
}

static inline __m512bh to_all_rows(__m128i chunk) { return (__m512bh)_mm512_broadcast_i32x4(chunk); }

// Of the sums of four ids the four lanes of each row added up: [4 rows, 4 ids].
static inline __m512 sum_chunks(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  const __m512 cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
  const __m512 low = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
  const __m512 high = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
  return low + high;
}

// logits[q, v / 4, r, v % 4] = hidden[4 q + r] . weight[v] for the ids of a tile; those past the last are left as anything.
template <int quads>
static void dot_quads(const BFloat16* hidden, const BFloat16* weight, int64_t width, int64_t size, float* logits,
                      Ahead& ahead) {
  Ahead next = ahead;  // in registers
  // a sum waits six cycles for the one before it: fewer quads take more ids at once
  constexpr int ids = quads > 3 ? 4 : 8;
  const int64_t whole = width / kChunk * kChunk, stride = quad_size(width);
  const __mmask8 rest = (1 << (width - whole)) - 1;
  for (int64_t v = 0; v < size; v += ids) {
    const BFloat16* w[ids];
    for (int c = 0; c < ids; c++) w[c] = weight + (v + c < size ? v + c : size - 1) * width;
    __m512 sum[quads][ids];
    for (int q = 0; q < quads; q++)
      for (int c = 0; c < ids; c++) sum[q][c] = _mm512_setzero_ps();
    for (int64_t k = 0; k < whole; k += kChunk) {
      next.step();
      __m512bh h[quads];
      for (int q = 0; q < quads; q++) h[q] = (__m512bh)_mm512_loadu_si512(hidden + q * stride + k * kQuadRows);
      for (int c = 0; c < ids; c++) {
        const __m512bh x = to_all_rows(_mm_loadu_si128((const __m128i*)(w[c] + k)));
        for (int q = 0; q < quads; q++) sum[q][c] = _mm512_dpbf16_ps(sum[q][c], h[q], x);
      }
    }
    if (rest) {
      for (int c = 0; c < ids; c++) {
        const __m512bh x = to_all_rows(_mm_maskz_loadu_epi16(rest, w[c] + whole));
        for (int q = 0; q < quads; q++) {
          const __m512bh h = (__m512bh)_mm512_loadu_si512(hidden + q * stride + whole * kQuadRows);
          sum[q][c] = _mm512_dpbf16_ps(sum[q][c], h, x);
        }
      }
    }
    for (int q = 0; q < quads; q++)
      for (int c = 0; c < ids; c += 4)
        _mm512_storeu_ps(logits + q * kQuadTile + (v + c) * kQuadRows,
                         sum_chunks(sum[q][c], sum[q][c + 1], sum[q][c + 2], sum[q][c + 3]));
  }
  ahead = next;
}

}  // namespace FASTLATENT_ISA
}  // namespace fastlatent
