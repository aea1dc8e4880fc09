"""A Gaussian latent: draw it by reparameterisation, price it against N(0, I), and give its log-density as an action.

Deviations: free bits (Kingma et al., arXiv:1606.04934, equation 15) bound the KL of each position and dimension from
below; the paper bounds a dimension's mean over the minibatch, which would make a gradient depend on what a position is
batched with. ATP-Latent (arXiv:2601.21598) uses no free bits and the mean over dimensions, `kl_T / D`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastlatent_kernels.check import FLOATS, compute_dtype, expect, expect_number
from fastlatent_kernels.dispatch import op
from fastlatent_kernels.noise import STREAM_LATENT, normal

MAX_LOGVAR = 80.0
"""Log-variances are clamped to +-80, with gradient 0 beyond: exp(80) = 5.5e34, so the variance, its inverse, and the
sums of 6,000 of them are finite in float32. No posterior in use comes near: exp(-80) is below the rounding of z."""

LOG_2PI = math.log(2 * math.pi)


class GaussianReparam(NamedTuple):
    z_TD: Tensor  # in the dtype of the mean
    kl_T: Tensor  # float32 (float64 for a float64 mean), like the next two; nats, summed over dimensions
    logprob_T: Tensor  # log-density of z_TD as it was rounded
    variance_T: Tensor  # mean posterior variance over dimensions; 1 is the collapsed posterior


def _check(mean_TD, logvar_TD, free_bits=0.0, *, seed=None, counter_T3=None, eps_TD=None, z_TD=None) -> None:
    expect("mean_TD", mean_TD, ("T", "D"))
    shape = tuple(mean_TD.shape)
    expect("logvar_TD", logvar_TD, shape, like=mean_TD)
    expect_number("free_bits", free_bits, "a finite number >= 0", 0 <= free_bits < math.inf)
    given = [name for name, tensor in (("seed", seed), ("counter_T3", counter_T3), ("eps_TD", eps_TD), ("z_TD", z_TD))
             if tensor is not None]
    if given not in (["seed", "counter_T3"], ["eps_TD"], ["z_TD"]):
        came = " and ".join(given) or "none"
        raise ValueError(f"noise: expected seed and counter_T3, or eps_TD, or z_TD, got {came}")
    if seed is not None:
        expect("seed", seed, (), (torch.int64,), mean_TD)
        expect("counter_T3", counter_T3, (shape[0], 3), (torch.int64,), mean_TD)
    if eps_TD is not None:
        expect("eps_TD", eps_TD, shape, FLOATS, mean_TD)
    if z_TD is not None:
        expect("z_TD", z_TD, shape, (mean_TD.dtype,), mean_TD)


@op(backends=("triton", "cuda"), check=_check)
def gaussian_reparam(mean_TD: Tensor, logvar_TD: Tensor, free_bits: float = 0.0, *, seed: Tensor | None = None,
                     counter_T3: Tensor | None = None, eps_TD: Tensor | None = None,
                     z_TD: Tensor | None = None) -> GaussianReparam:
    """z = mean + exp(logvar / 2) * eps, with its KL, log-density and variance; gradients reach mean and logvar.

    kl = sum_D max((mean^2 + exp(logvar) - 1 - logvar) / 2, free_bits), no gradient where the bound holds;
    logprob = -sum_D (((z - mean) / exp(logvar / 2))^2 + logvar + log 2 pi) / 2; variance = mean_D exp(logvar).

    In `logprob_T` z is held constant: it is the action, and the gradient is the score that a policy gradient wants. So
    passing the z of a rollout back as `z_TD` gives the same value and the same gradient.

    Args:
        free_bits: least KL of one dimension of one position, in nats.
        seed, counter_T3: int64, see `fastlatent_kernels.noise`; (position, prompt id, step * 2**16 + sample).
        eps_TD: standard normal noise instead; a constant.
        z_TD: evaluate at this z instead of drawing one; a constant, in the dtype of `mean_TD`, and returned.

    Returns:
        `GaussianReparam`. Arithmetic is float32, float64 for a float64 mean. A float16 z beyond 65504 is infinite.
    """
    dtype = compute_dtype(mean_TD)
    mean, logvar = mean_TD.to(dtype), logvar_TD.to(dtype).clamp(-MAX_LOGVAR, MAX_LOGVAR)
    if z_TD is None:
        eps = _noise(mean_TD, seed, counter_T3) if eps_TD is None else eps_TD.detach()
        z_TD = (mean + torch.exp(logvar / 2) * eps.to(dtype)).to(mean_TD.dtype)
    else:
        z_TD = z_TD.detach()
    kl_TD = (mean.square() + torch.expm1(logvar) - logvar) / 2
    action_eps = (z_TD.detach().to(dtype) - mean) * torch.exp(-logvar / 2)
    return GaussianReparam(
        z_TD, torch.where(kl_TD < free_bits, free_bits, kl_TD).sum(dim=1),
        (action_eps.square() + logvar + LOG_2PI).sum(dim=1) / -2, torch.exp(logvar).mean(dim=1))


def _noise(mean_TD: Tensor, seed: Tensor, counter_T3: Tensor) -> Tensor:
    position, prompt, sample_word = counter_T3[:, 0:1], counter_T3[:, 1:2], counter_T3[:, 2:3]
    dimension_D = torch.arange(mean_TD.shape[1], device=mean_TD.device)
    return normal(seed, dimension_D, position, STREAM_LATENT, prompt, sample_word)
