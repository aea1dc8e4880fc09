// soft_embedding: weighted sums of the rows that ids name, and the gradients of the weights and of those rows.
#pragma once

#include "../structs.h"
#include "simd.h"
#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastlatent {
namespace FASTLATENT_ISA {

// sum += weights[i] * from[i] for `count` rows read side by side
template <int count, class T>
static inline void add_rows(const T* const (&from)[4], const float (&weights)[4], int64_t width, float* sum) {
  for (int64_t d = 0; d < width; d += kLanes) {
    floats total = load_some(sum + d, width - d);
    for (int i = 0; i < count; i++) total += weights[i] * load_some(from[i] + d, width - d);
    store_some(sum + d, total, width - d);
  }
}

// out = the sum of row(i) times weight(i) over i < count
template <class T, class Row, class Weight>
static inline void sum_rows(int64_t count, Row row, Weight weight, int64_t width, float* sum, T* out) {
  __builtin_memset(sum, 0, width * sizeof(float));
  for (int64_t i = 0; i < count;) {
    const T* from[4];
    float weights[4];
    const int n = i + 4 <= count ? 4 : 1;
    for (int j = 0; j < n; j++) from[j] = row(i + j), weights[j] = weight(i + j);
    n == 4 ? add_rows<4>(from, weights, width, sum) : add_rows<1>(from, weights, width, sum);
    i += n;
  }
  for (int64_t d = 0; d < width; d += kLanes) store_some(out + d, load_some(sum + d, width - d), width - d);
}

// Calls `row(index, this thread's sums)` for index < count.
template <class Row>
static inline void parallel_sums(const SoftEmbedding& args, int64_t count, Row row) {
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(args.threads)
  for (int64_t i = 0; i < count; i++) row(i, args.scratch + omp_get_thread_num() * args.width);
#else
  for (int64_t i = 0; i < count; i++) row(i, args.scratch);
#endif
}

template <class T>
static void mix_rows(const SoftEmbedding& args) {
  parallel_sums(args, args.rows, [&](int64_t n, float* sum) {
    const int64_t* ids = args.ids + n * args.mixed;
    const float* weights = args.weight + n * args.mixed;
    sum_rows(args.mixed, [&](int64_t k) { return (const T*)args.table + ids[k] * args.width; },
             [&](int64_t k) { return weights[k]; }, args.width, sum, (T*)args.out + n * args.width);
  });
}

template <class T>
static void weight_gradient_rows(const SoftEmbedding& args) {
  const int64_t width = args.width;
  parallel_sums(args, args.rows, [&](int64_t n, float*) {
    const T* grad = (const T*)args.grad + n * width;
    for (int64_t k = n * args.mixed; k < (n + 1) * args.mixed; k++) {
      const T* row = (const T*)args.table + args.ids[k] * width;
      floats even = splat(0), odd = splat(0);
      for (int64_t d = 0; d < width; d += 2 * kLanes) {
        even += load_some(grad + d, width - d) * load_some(row + d, width - d);
        if (d + kLanes < width) odd += load_some(grad + d + kLanes, width - d - kLanes) *
                                       load_some(row + d + kLanes, width - d - kLanes);
      }
      ((float*)args.out)[k] = sum_lanes(even + odd);
    }
  });
}

template <class T>
static void table_gradient_rows(const SoftEmbedding& args) {
  parallel_sums(args, args.vocab, [&](int64_t v, float* sum) {
    const int64_t* places = args.place + args.begin[v];
    T* out = (T*)args.out + v * args.width;
    const int64_t count = args.begin[v + 1] - args.begin[v];
    if (count == 0) {
      __builtin_memset(out, 0, args.width * sizeof(T));
      return;
    }
    sum_rows(count, [&](int64_t i) { return (const T*)args.grad + places[i] / args.mixed * args.width; },
             [&](int64_t i) { return args.weight[places[i]]; }, args.width, sum, out);
  });
}

void soft_embedding(const SoftEmbedding& args) { args.is_bf16 ? mix_rows<BFloat16>(args) : mix_rows<float>(args); }

void soft_embedding_weight_gradient(const SoftEmbedding& args) {
  args.is_bf16 ? weight_gradient_rows<BFloat16>(args) : weight_gradient_rows<float>(args);
}

void soft_embedding_table_gradient(const SoftEmbedding& args) {
  args.is_bf16 ? table_gradient_rows<BFloat16>(args) : table_gradient_rows<float>(args);
}

}  // namespace FASTLATENT_ISA
}  // namespace fastlatent
