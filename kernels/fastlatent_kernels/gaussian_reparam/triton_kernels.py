"""The arithmetic of gaussian_reparam in Triton: one pass forward, one backward; noise is drawn again, never stored."""

from __future__ import annotations

import triton
import triton.language as tl

from fastlatent_kernels.gaussian_reparam import LOG_2PI, MAX_LOGVAR
from fastlatent_kernels.noise import STREAM_LATENT
from fastlatent_kernels.triton_support import expm1, noise_row, uniform

_MAX_LOGVAR, _LOG_2PI, _STREAM = tl.constexpr(MAX_LOGVAR), tl.constexpr(LOG_2PI), tl.constexpr(STREAM_LATENT)


@triton.jit
def inverse_normal(u):
    """The inverse normal distribution function at an odd multiple of 2**-24, to 3e-6 of the result.

    Giles, "Approximating the erfinv function" (GPU Computing Gems, 2011), single precision.
    """
    # 1 - u is exact for such u, so both tails are equally good
    w = -tl.log(4.0 * u * (1.0 - u))
    c = w - 2.5
    centre = 2.81022636e-08
    centre = centre * c + 3.43273939e-07
    centre = centre * c + -3.5233877e-06
    centre = centre * c + -4.39150654e-06
    centre = centre * c + 0.00021858087
    centre = centre * c + -0.00125372503
    centre = centre * c + -0.00417768164
    centre = centre * c + 0.246640727
    centre = centre * c + 1.50140941
    t = tl.sqrt(tl.maximum(w, 5.0)) - 3.0
    tail = -0.000200214257
    tail = tail * t + 0.000100950558
    tail = tail * t + 0.00134934322
    tail = tail * t + -0.00367342844
    tail = tail * t + 0.00573950773
    tail = tail * t + -0.0076224613
    tail = tail * t + 0.00943887047
    tail = tail * t + 1.00167406
    tail = tail * t + 2.83297682
    return tl.where(w < 5.0, centre, tail) * (2.0 * u - 1.0) * 1.4142135623730951


@triton.jit
def _load(pointer, offset, mask):
    return tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _clamped(logvar):
    # comparisons and not minimum, which would turn NaN into a number
    return tl.where(logvar > _MAX_LOGVAR, _MAX_LOGVAR, tl.where(logvar < -_MAX_LOGVAR, -_MAX_LOGVAR, logvar))


@triton.jit
def _kl(mean, logvar):
    return 0.5 * (mean * mean + expm1(logvar) - logvar)


@triton.jit
def _draw(mean, sigma, seed_ptr, counter_ptr, given_ptr, offset, live, row, d, dtype: tl.constexpr,
          SOURCE: tl.constexpr):
    """eps, and z as rounded to `dtype`; a given z has no eps."""
    if SOURCE == "z":
        eps, z = 0.0, _load(given_ptr, offset, live)
    else:
        if SOURCE == "eps":
            eps = _load(given_ptr, offset, live)
        else:
            key_lo, key_hi, position, prompt, sample_word = noise_row(seed_ptr, counter_ptr, row)
            eps = inverse_normal(uniform(key_lo, key_hi, d, position, _STREAM, prompt, sample_word))
        z = (mean + sigma * eps).to(dtype).to(tl.float32)
    return eps, z


@triton.jit
def forward_kernel(mean_ptr, logvar_ptr, seed_ptr, counter_ptr, given_ptr, z_ptr, kl_ptr, logprob_ptr, variance_ptr, T,
                   free_bits, D: tl.constexpr, SOURCE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    # rows past the end repeat the last one, so that every address is valid, and store nothing
    is_row, row = row < T, tl.minimum(row, T - 1)
    kl_sum = tl.zeros([BT, BD], tl.float32)
    square_sum, variance_sum = kl_sum, kl_sum
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)[None, :]
        offset, live = row[:, None].to(tl.int64) * D + d, is_row[:, None] & (d < D)
        mean, logvar = _load(mean_ptr, offset, live), _clamped(_load(logvar_ptr, offset, live))
        sigma = tl.exp(0.5 * logvar)
        eps, z = _draw(mean, sigma, seed_ptr, counter_ptr, given_ptr, offset, live, row[:, None], d,
                       mean_ptr.dtype.element_ty, SOURCE)
        if z_ptr is not None:
            tl.store(z_ptr + offset, z.to(z_ptr.dtype.element_ty), mask=live)
        kl = _kl(mean, logvar)
        kl_sum += tl.where(live, tl.where(kl < free_bits, free_bits, kl), 0.0)
        action_eps = (z - mean) * tl.exp(-0.5 * logvar)
        square_sum += tl.where(live, action_eps * action_eps + logvar + _LOG_2PI, 0.0)
        variance_sum += tl.where(live, tl.exp(logvar), 0.0)
    tl.store(kl_ptr + row, tl.sum(kl_sum, axis=1), mask=is_row)
    tl.store(logprob_ptr + row, -0.5 * tl.sum(square_sum, axis=1), mask=is_row)
    tl.store(variance_ptr + row, tl.sum(variance_sum, axis=1) * (1.0 / D), mask=is_row)


@triton.jit
def _row_gradient(pointer, row, is_row):
    """[BT, 1]; 0 for an output that nobody uses."""
    if pointer is None:
        gradient = 0.0
    else:
        gradient = tl.load(pointer + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
    return gradient


@triton.jit
def backward_kernel(g_z_ptr, g_kl_ptr, g_logprob_ptr, g_variance_ptr, mean_ptr, logvar_ptr, seed_ptr, counter_ptr,
                    given_ptr, d_mean_ptr, d_logvar_ptr, T, free_bits, D: tl.constexpr, SOURCE: tl.constexpr,
                    BT: tl.constexpr, BD: tl.constexpr):
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    is_row, row = row < T, tl.minimum(row, T - 1)
    g_kl, g_logprob = _row_gradient(g_kl_ptr, row, is_row), _row_gradient(g_logprob_ptr, row, is_row)
    g_variance = _row_gradient(g_variance_ptr, row, is_row) * (1.0 / D)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)[None, :]
        offset, live = row[:, None].to(tl.int64) * D + d, is_row[:, None] & (d < D)
        mean, raw_logvar = _load(mean_ptr, offset, live), _load(logvar_ptr, offset, live)
        logvar = _clamped(raw_logvar)
        sigma, inverse_sigma = tl.exp(0.5 * logvar), tl.exp(-0.5 * logvar)
        eps, z = _draw(mean, sigma, seed_ptr, counter_ptr, given_ptr, offset, live, row[:, None], d,
                       mean_ptr.dtype.element_ty, SOURCE)
        action_eps = (z - mean) * inverse_sigma
        pays = tl.where(_kl(mean, logvar) < free_bits, 0.0, g_kl)
        d_mean = pays * mean + g_logprob * (action_eps * inverse_sigma)
        d_logvar = 0.5 * (pays * expm1(logvar) + g_logprob * (action_eps * action_eps - 1.0))
        d_logvar += g_variance * tl.exp(logvar)
        if g_z_ptr is not None:
            g_z = _load(g_z_ptr, offset, live)
            d_mean += g_z
            d_logvar += 0.5 * g_z * (sigma * eps)
        tl.store(d_mean_ptr + offset, d_mean.to(d_mean_ptr.dtype.element_ty), mask=live)
        d_logvar = tl.where(logvar == raw_logvar, d_logvar, 0.0)
        tl.store(d_logvar_ptr + offset, d_logvar.to(d_logvar_ptr.dtype.element_ty), mask=live)
