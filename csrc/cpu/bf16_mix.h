// The mixture of vocab_head over one tile of the vocabulary: p times the embedding, by dot products of bfloat16 pairs
// (AVX512_BF16).
//
// A pair is one column of the ids v and v + 1, which the embedding has in two rows: they are interleaved for the first
// rows of p, and kept in the first level cache for the others. Of each 32 columns the interleaving gives first those
// with column % 8 < 4; sums keep that order, which `in_order` undoes.
#pragma once

#include "bf16_dot.h"

namespace fastlatent {
namespace FASTLATENT_ISA {

constexpr int kPairs = 32;      // columns of two vectors of pairs
constexpr int kQuadGroups = 3;  // times kPairs, for up to four rows: fewer sums would wait for each other
constexpr int kBlockRows = 8;   // times kPairs, for more rows: what is kept leaves the first level cache room for the rest

enum class Panel { unused, written, read };

static inline __mmask32 first_of(int64_t n) { return n >= kPairs ? ~(__mmask32)0 : ((__mmask32)1 << n) - 1; }

// sum[r, columns] += p[v / 4, r, v % 4] embed[v, columns] over the ids of a tile, for `rows` of two quads and `groups`
// times 32 columns, of which the last `mask` exist. p is 0 past the last id; rows of `sum` are `stride` apart, and begin as
// anything where `kept` is 0 instead of all ones.
template <int rows, int groups, Panel use>
static void add_columns(const BFloat16* p, const BFloat16* embed, int64_t embed_width, int64_t size, __mmask32 mask,
                        __mmask16 kept, float* sum, int64_t stride, BFloat16* panel, Ahead& ahead) {
  Ahead next = ahead;  // in registers
  // unrolled before GCC decides what stays in registers: in some cases it else stores every sum in every step
  __m512 s[rows][2 * groups];
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 6
    for (int g = 0; g < 2 * groups; g++) s[r][g] = _mm512_maskz_loadu_ps(kept, sum + r * stride + g * 16);
  for (int64_t v = 0; v < size; v += 2, panel += 2 * groups * kPairs) {
    next.step();
    __m512i x[2 * groups];
    if constexpr (use == Panel::read) {
      for (int g = 0; g < 2 * groups; g++) x[g] = _mm512_load_si512(panel + g * kPairs);
    } else {
      const BFloat16* even = embed + v * embed_width;
      const BFloat16* odd = v + 1 < size ? even + embed_width : even;  // p is 0 there
      for (int g = 0; g < groups; g++) {
        const __mmask32 some = g == groups - 1 ? mask : ~(__mmask32)0;
        const __m512i a = _mm512_maskz_loadu_epi16(some, even + g * kPairs);
        const __m512i b = _mm512_maskz_loadu_epi16(some, odd + g * kPairs);
        x[2 * g] = _mm512_unpacklo_epi16(a, b);
        x[2 * g + 1] = _mm512_unpackhi_epi16(a, b);
      }
      if constexpr (use == Panel::written)
        for (int g = 0; g < 2 * groups; g++) _mm512_store_si512(panel + g * kPairs, x[g]);
    }
    const BFloat16* pairs = p + v / 4 * 4 * kQuadRows + v % 4;
    for (int r = 0; r < rows; r++) {
      int32_t pair;
      __builtin_memcpy(&pair, pairs + r / kQuadRows * kQuadTile + r % kQuadRows * 4, sizeof pair);
      const __m512bh weight = (__m512bh)_mm512_set1_epi32(pair);
      for (int g = 0; g < 2 * groups; g++) s[r][g] = _mm512_dpbf16_ps(s[r][g], weight, (__m512bh)x[g]);
    }
  }
  ahead = next;
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 6
    for (int g = 0; g < 2 * groups; g++) _mm512_storeu_ps(sum + r * stride + g * 16, s[r][g]);
}

template <int n>
struct Count {
  static constexpr int value = n;
};

// Calls `run` with the Count of some rows, kBlockRows at most.
template <class Run>
static inline void with_count(int64_t rows, Run run) {
  switch (rows) {
    case 1: run(Count<1>()); break;
    case 2: run(Count<2>()); break;
    case 3: run(Count<3>()); break;
    case 4: run(Count<4>()); break;
    case 5: run(Count<5>()); break;
    case 6: run(Count<6>()); break;
    case 7: run(Count<7>()); break;
    default: run(Count<kBlockRows>());
  }
}

// `add_columns` for up to four rows.
template <int groups>
static void add_quad(const BFloat16* p, const BFloat16* embed, int64_t embed_width, int64_t size, __mmask32 mask, int64_t rows,
                     __mmask16 kept, float* sum, int64_t stride, Ahead& ahead) {
  with_count(rows, [&](auto count) {
    if constexpr (count.value <= kQuadRows)
      add_columns<count.value, groups, Panel::unused>(p, embed, embed_width, size, mask, kept, sum, stride, nullptr, ahead);
  });
}

// `add_columns` for any number of rows and up to 32 columns.
static void add_panel(const BFloat16* p, const BFloat16* embed, int64_t embed_width, int64_t size, __mmask32 mask, int64_t rows,
                      __mmask16 kept, float* sum, int64_t stride, Ahead& ahead) {
  alignas(64) BFloat16 panel[kTileSize * kPairs];
  for (int64_t r = 0; r < rows; r += kBlockRows, p += kBlockRows * kTileSize, sum += kBlockRows * stride)
    with_count(rows - r, [&](auto count) {
      const auto add = r == 0 ? add_columns<count.value, 1, Panel::written> : add_columns<count.value, 1, Panel::read>;
      add(p, embed, embed_width, size, mask, kept, sum, stride, panel, ahead);
    });
}

static inline int64_t panel_columns(int64_t rows) { return rows > kQuadRows ? kPairs : kQuadGroups * kPairs; }

// The steps that `add_tile` takes at least.
static inline int64_t add_steps(int64_t embed_width, int64_t size, int64_t rows) {
  const int64_t panels = (embed_width + panel_columns(rows) - 1) / panel_columns(rows);
  return panels * ((rows + kBlockRows - 1) / kBlockRows) * (size / 2) + 1;
}

// sum[rows, columns] += p embed for the ids of a tile and every column; = where the tile `is_first`. p has kQuadTile for
// each quad.
static void add_tile(const BFloat16* p, const BFloat16* embed, int64_t embed_width, int64_t size, int64_t rows, bool is_first,
                     float* sum, int64_t stride, Ahead& ahead) {
  const int64_t panel = panel_columns(rows);
  for (int64_t column = 0; column < embed_width; column += panel) {
    const int64_t left = embed_width - column;
    const __mmask32 mask = first_of(left >= panel ? kPairs : (left - 1) % kPairs + 1);
    const auto add = rows > kQuadRows ? add_panel
                     : left > 2 * kPairs ? add_quad<3>
                     : left > kPairs     ? add_quad<2>
                                         : add_quad<1>;
    add(p, embed + column, embed_width, size, mask, rows, is_first ? 0 : ~0, sum + column, stride, ahead);
  }
}

// 16 columns in their order, the first or second half of the 32 at `sums`.
static inline floats in_order(const floats low, const floats high, int half) {
  const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  return (floats)_mm512_permutex2var_ps((__m512)low, _mm512_add_epi32(first, _mm512_set1_epi32(8 * half)), (__m512)high);
}

}  // namespace FASTLATENT_ISA
}  // namespace fastlatent
