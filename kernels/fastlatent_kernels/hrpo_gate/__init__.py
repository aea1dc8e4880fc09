"""The gate of HRPO (arXiv:2505.18454): how much of the next input is the drawn token, how much the vocabulary mixture.

Deviations from the paper: softplus(-Lambda), the sign of the authors' code and initialiser (the paper prints +Lambda),
and sqrt(1 - a^2) without their 1e-8 (`compat_eps` puts it back), so that a = 1 is exactly plain token reasoning.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fastlatent_kernels.check import FLOATS, compute_dtype, expect, expect_number
from fastlatent_kernels.dispatch import op

DECAY_SCALE = 8.0
"""The constant c of log a = -c softplus(-Lambda) r."""


def _check(u_T2D, token_TD, mixture_TD, bias_2D, lambda_D, latent_T, compat_eps=0.0) -> None:
    expect("token_TD", token_TD, ("T", "D"))
    T, D = token_TD.shape
    expect("u_T2D", u_T2D, (T, 2 * D), like=token_TD)
    expect("mixture_TD", mixture_TD, (T, D), like=token_TD)
    expect("bias_2D", bias_2D, (2 * D,), like=token_TD)
    expect("lambda_D", lambda_D, (D,), FLOATS[:2], like=token_TD)
    expect("latent_T", latent_T, (T,), (torch.bool,), like=token_TD)
    expect_number("compat_eps", compat_eps, "a number >= 0", compat_eps >= 0)


@op(backends=("triton", "native"), check=_check)
def hrpo_gate(u_T2D: Tensor, token_TD: Tensor, mixture_TD: Tensor, bias_2D: Tensor, lambda_D: Tensor, latent_T: Tensor,
              compat_eps: float = 0.0) -> Tensor:
    """Input embeddings `a * token + s * (i * mixture)` at latent positions, `token` bit for bit elsewhere.

    r = sigmoid(u[:, :D] + bias[:D]), i = sigmoid(u[:, D:] + bias[D:]), log a = -8 softplus(-Lambda) r,
    s = sqrt(-expm1(2 log a) + compat_eps), which is sqrt(1 - a^2) without cancellation.

    Args:
        u_T2D: token embeddings times the two stacked gate matrices.
        lambda_D: float32 (or float64): a is within 1e-2 of 1, beyond what half precision resolves.
        latent_T: bool.

    Returns:
        [T, D] in the dtype of `token_TD`; arithmetic is float32. Where log a = 0 and compat_eps = 0 it equals
        `token_TD` bit for bit, and the gradients of u, bias and Lambda take their limit there (through s: 0).
    """
    dtype, D = compute_dtype(token_TD), token_TD.shape[1]
    gate_T2D = torch.sigmoid(u_T2D.to(dtype) + bias_2D.to(dtype))
    log_a_TD = _log_decay(gate_T2D[:, :D], lambda_D.to(dtype))
    latent_part_TD = _complement(log_a_TD, compat_eps) * (gate_T2D[:, D:] * mixture_TD.to(dtype))
    gated_TD = torch.exp(log_a_TD) * token_TD.to(dtype) + latent_part_TD
    return torch.where(latent_T[:, None], gated_TD.to(token_TD.dtype), token_TD)


def gate_decay(u_TD: Tensor, bias_D: Tensor, lambda_D: Tensor) -> Tensor:
    """The gate's decay a [T, D], float32 (float64 for float64), from the first halves of `u_T2D` and its bias."""
    dtype = compute_dtype(u_TD)
    return torch.exp(_log_decay(torch.sigmoid(u_TD.to(dtype) + bias_D.to(dtype)), lambda_D.to(dtype)))


def _log_decay(r_TD: Tensor, lambda_D: Tensor) -> Tensor:
    return -DECAY_SCALE * softplus(-lambda_D) * r_TD


def _complement(log_a_TD: Tensor, compat_eps: float) -> Tensor:
    """sqrt(1 - a^2 + compat_eps), its gradient finite where a is 1."""
    if compat_eps > 0:
        return torch.sqrt(compat_eps - torch.expm1(2 * log_a_TD))
    # the slope of sqrt at 0 is infinite while that of log a is 0, their product 0: the inner where keeps the infinity
    # out of autograd. `tiny` and not 0, because hardware may flush subnormal numbers to 0 after the comparison
    is_one_TD = log_a_TD > -torch.finfo(log_a_TD.dtype).tiny
    away_TD = torch.where(is_one_TD, -1.0, log_a_TD)
    return torch.where(is_one_TD, 0.0, torch.sqrt(-torch.expm1(2 * away_TD)))
