// One element of gaussian_reparam, and its noise: the arithmetic of gaussian_reparam.cu, which a CPU compiles too, so
// that it is tested where there is no GPU. Specified in kernels/fastlatent_kernels/gaussian_reparam/__init__.py.
#pragma once

#include <math.h>
#include <stdint.h>

#include "noise.h"

namespace fastlatent {

constexpr float kMaxLogvar = 80.0f;  // why: MAX_LOGVAR there
constexpr float kLog2Pi = 1.8378770664093453f;

struct LatentNoise : RowNoise {
  LatentNoise() = default;
  FASTLATENT_BOTH LatentNoise(int64_t seed, const int64_t* counter) : RowNoise(seed, counter, kStreamLatent) {}
};

// Inverse normal distribution function at an odd multiple of 2^-24. Giles, "Approximating the erfinv function" (GPU
// Computing Gems, 2011), single precision.
FASTLATENT_BOTH float inverse_normal(float u) {
  const float w = -logf(4.0f * u * (1.0f - u));  // 1 - u is exact for such u: both tails are equally good
  float p;
  if (w < 5.0f) {
    const float c = w - 2.5f;
    p = 2.81022636e-08f;
    p = p * c + 3.43273939e-07f;
    p = p * c - 3.5233877e-06f;
    p = p * c - 4.39150654e-06f;
    p = p * c + 0.00021858087f;
    p = p * c - 0.00125372503f;
    p = p * c - 0.00417768164f;
    p = p * c + 0.246640727f;
    p = p * c + 1.50140941f;
  } else {
    const float t = sqrtf(w) - 3.0f;
    p = -0.000200214257f;
    p = p * t + 0.000100950558f;
    p = p * t + 0.00134934322f;
    p = p * t - 0.00367342844f;
    p = p * t + 0.00573950773f;
    p = p * t - 0.0076224613f;
    p = p * t + 0.00943887047f;
    p = p * t + 1.00167406f;
    p = p * t + 2.83297682f;
  }
  return p * (2.0f * u - 1.0f) * 1.4142135623730951f;
}

// What one dimension of one position needs, whichever way z came to be.
struct Posterior {
  float mean, logvar, sigma;
  bool is_clamped;

  // comparisons and not fminf, which would turn NaN into a number
  FASTLATENT_BOTH Posterior(float mean, float raw)
      : mean(mean), logvar(raw > kMaxLogvar ? kMaxLogvar : raw < -kMaxLogvar ? -kMaxLogvar : raw),
        sigma(expf(0.5f * logvar)), is_clamped(logvar != raw) {}

  FASTLATENT_BOTH float kl() const { return 0.5f * (mean * mean + expm1f(logvar) - logvar); }
  FASTLATENT_BOTH float action_eps(float z) const { return (z - mean) * expf(-0.5f * logvar); }
};

// Sums over the dimensions of one position.
struct RowSums {
  float kl = 0, square = 0, variance = 0;

  FASTLATENT_BOTH void add(const Posterior& q, float z, float free_bits) {
    const float nats = q.kl(), eps = q.action_eps(z);
    kl += nats < free_bits ? free_bits : nats;
    square += eps * eps + q.logvar + kLog2Pi;
    variance += expf(q.logvar);
  }
};

// Gradients of the outputs that belong to a position; variance is already divided by the width.
struct RowGradients {
  float kl = 0, logprob = 0, variance = 0;
};

FASTLATENT_BOTH void differentiate(const Posterior& q, float z, float eps, float g_z, const RowGradients& g,
                                   float free_bits, float* d_mean, float* d_logvar) {
  const float pays = q.kl() < free_bits ? 0.0f : g.kl, at = q.action_eps(z);
  *d_mean = g_z + pays * q.mean + g.logprob * (at * expf(-0.5f * q.logvar));
  const float slope = 0.5f * (pays * expm1f(q.logvar) + g.logprob * (at * at - 1.0f) + g_z * (q.sigma * eps)) +
                      g.variance * expf(q.logvar);
  *d_logvar = q.is_clamped ? 0.0f : slope;
}

}  // namespace fastlatent
