// hrpo_gate: one pass over u, token and mixture forward, one backward; the formulas are those of hrpo_gate/__init__.py.
#pragma once

#include "../structs.h"
#include "simd.h"

namespace fastlatent {
namespace FASTLATENT_ISA {

static inline floats reciprocal_root(floats x) {
  floats y;
  for (int i = 0; i < kLanes; i++) y[i] = 1.0f / __builtin_sqrtf(x[i]);
  return y;
}

static inline floats sigmoid(floats x) {
  const floats z = exp_negative(x < 0.0f ? x : -x);
  const floats y = (x < 0.0f ? z : splat(1.0f)) / (1.0f + z);
  return x == x ? y : x;  // exp_negative would hide a NaN
}

// The gate of kLanes columns of one row.
struct Gate {
  floats r, i, log_a, a, s, inv_s;

  Gate(floats u_r, floats u_i, floats log_scale, float compat_eps) {
    r = sigmoid(u_r);
    i = sigmoid(u_i);
    log_a = log_scale * r;
    a = log_a == log_a ? exp_negative(log_a) : log_a;
    const floats y = -2.0f * log_a;
    // 1 - exp(-y) by its series: 1 - a * a would cancel there
    floats series = 1.0f - y * (1.0f / 8);
    for (int n = 7; n > 1; n--) series = 1.0f - y * (1.0f / n) * series;
    const floats square = (y < 0.5f ? y * series : 1.0f - a * a) + compat_eps;
    // a = 1 without compat_eps: 1 / s would be a pole. Twice the smallest normal float, the reference's limit for log a
    const floats smallest = splat(2.3509887e-38f);
    inv_s = square < smallest ? splat(0.0f) : reciprocal_root(larger(square, smallest));
    s = square * inv_s;
  }
};

// That of the columns from d on, in a row whose pre-activations are u.
template <class T>
static inline Gate gate_of(const HrpoGate& args, const T* u, int64_t d) {
  const int64_t width = args.width, n = width - d;
  return Gate(load_some(u + d, n) + load_some(args.bias + d, n),
              load_some(u + width + d, n) + load_some(args.bias + width + d, n), load_some(args.log_scale + d, n),
              args.compat_eps);
}

template <class T>
static void gate_rows(const HrpoGate& args) {
  const int64_t width = args.width;
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(args.threads)
#endif
  for (int64_t t = 0; t < args.rows; t++) {
    const T *u = (const T*)args.u + t * 2 * width, *token = (const T*)args.token + t * width;
    const T* mixture = (const T*)args.mixture + t * width;
    T* out = (T*)args.out + t * width;
    if (!args.latent[t]) {
      __builtin_memcpy(out, token, width * sizeof(T));
      continue;
    }
    for (int64_t d = 0; d < width; d += kLanes) {
      const int64_t n = width - d;
      const Gate gate = gate_of(args, u, d);
      store_some(out + d, gate.a * load_some(token + d, n) + gate.s * (gate.i * load_some(mixture + d, n)), n);
    }
  }
}

// A thread takes whole chunks of rows, whose sums have a place of their own: they do not depend on the threads.
template <class T>
static void gate_backward_rows(const HrpoGateBackward& args) {
  const int64_t width = args.width, chunks = (args.rows + args.chunk_rows - 1) / args.chunk_rows;
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(args.threads)
#endif
  for (int64_t c = 0; c < chunks; c++) {
    const int64_t begin = c * args.chunk_rows, past = begin + args.chunk_rows;
    float* sums = args.partial + c * 3 * width;
    __builtin_memset(sums, 0, 3 * width * sizeof(float));
    for (int64_t t = begin; t < (past < args.rows ? past : args.rows); t++) {
      const T *u = (const T*)args.u + t * 2 * width, *token = (const T*)args.token + t * width;
      const T *mixture = (const T*)args.mixture + t * width, *grad = (const T*)args.grad + t * width;
      T* du = (T*)args.du + t * 2 * width;
      T* dtoken = args.dtoken ? (T*)args.dtoken + t * width : nullptr;
      T* dmixture = args.dmixture ? (T*)args.dmixture + t * width : nullptr;
      if (!args.latent[t]) {
        __builtin_memset(du, 0, 2 * width * sizeof(T));
        if (dtoken) __builtin_memcpy(dtoken, grad, width * sizeof(T));
        if (dmixture) __builtin_memset(dmixture, 0, width * sizeof(T));
        continue;
      }
      for (int64_t d = 0; d < width; d += kLanes) {
        const int64_t n = width - d;
        const Gate gate = gate_of(args, u, d);
        const floats g = load_some(grad + d, n), h = gate.i * load_some(mixture + d, n);
        // ds / dlog a = -a^2 / s: a pole at a = 1, where the gradients of u and Lambda have another factor 0
        const floats dlog_a = g * (gate.a * load_some(token + d, n) - gate.a * gate.a * gate.inv_s * h);
        const floats du_r = dlog_a * gate.log_a * (1.0f - gate.r), du_i = g * gate.s * h * (1.0f - gate.i);
        store_some(du + d, du_r, n);
        store_some(du + width + d, du_i, n);
        if (dtoken) store_some(dtoken + d, g * gate.a, n);
        if (dmixture) store_some(dmixture + d, g * gate.s * gate.i, n);
        store_some(sums + d, load_some(sums + d, n) + du_r, n);
        store_some(sums + width + d, load_some(sums + width + d, n) + du_i, n);
        store_some(sums + 2 * width + d, load_some(sums + 2 * width + d, n) + dlog_a * gate.r, n);
      }
    }
  }
}

void hrpo_gate(const HrpoGate& args) { args.is_bf16 ? gate_rows<BFloat16>(args) : gate_rows<float>(args); }

void hrpo_gate_backward(const HrpoGateBackward& args) {
  args.is_bf16 ? gate_backward_rows<BFloat16>(args) : gate_backward_rows<float>(args);
}

}  // namespace FASTLATENT_ISA
}  // namespace fastlatent
