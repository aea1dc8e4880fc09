"""Log-probability and entropy of given tokens straight from hidden states; the [A, V] logits never exist at once.

Logits are made for a few rows at a time and made again in the backward pass: a GEMM more, A * V floats less.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastlatent_kernels.check import compute_dtype, expect, expect_ids
from fastlatent_kernels.dispatch import op
from fastlatent_kernels.token_logprob.chunks import matmul, through_chunks
from fastlatent_kernels.token_logprob.temperature import (
    Temperature, check_temperature, column, cool, of_rows, rows_temperature)


def _check(hidden_AD, weight_VD, target_A, temperature=1.0) -> None:
    check_head(hidden_AD, weight_VD, target_A)
    check_temperature(temperature, hidden_AD)


def check_head(hidden_AD, weight_VD, target_A) -> None:
    """ValueError unless these fit each other; the targets may be [A, K]."""
    expect("hidden_AD", hidden_AD, ("A", "D"))
    A, D = hidden_AD.shape
    expect("weight_VD", weight_VD, ("V", D), like=hidden_AD)
    is_several = isinstance(target_A, Tensor) and target_A.ndim == 2
    expect("target_A", target_A, (A, "K") if is_several else (A,), (torch.int64,), like=hidden_AD)


@op(backends=("triton",), check=_check)
def token_logprob(hidden_AD: Tensor, weight_VD: Tensor, target_A: Tensor,
                  temperature: Temperature = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under softmax(hidden @ weight.T / temperature), and its entropy in nats.

    Args:
        hidden_AD: its dtype is that of the GEMMs; logits and all that follows are float32 (float64 for float64).
        weight_VD: may be a float32 master of a bfloat16 model: it is rounded to the dtype of `hidden_AD` once per
            call, and its gradient, accumulated in float32, comes back in its own dtype.
        target_A: ids, one a row or [A, K]: K a row, whose log-probabilities are then [A, K]. One that is no row of
            `weight_VD` is a ValueError on a CPU; on a GPU, where nothing can be raised, its log-probability is NaN.
        temperature: above 0; one number, or [A] in float32 or float64: one a row, without gradient. There, on a GPU,
            one that is not above 0 makes its row NaN.

    Returns:
        logprob_A and entropy_A, float32, both differentiable in hidden and weight.
    """
    expect_ids("target_A", target_A, len(weight_VD))
    return TokenLogprob.apply(hidden_AD, weight_VD, target_A, temperature, read_rows, grad_rows)


def head_logits(hidden_BD: Tensor, weight_VD: Tensor) -> Tensor:
    """hidden @ weight.T [B, V] in float32 (float64 for float64), without gradient.

    On CUDA a half-precision GEMM writes its float32 accumulators; on a CPU its results come rounded to half precision.
    A float32 weight may come in oneDNN's own layout (`torch.ops.mkldnn._reorder_linear_weight`), made once for many
    calls.
    """
    with torch.no_grad():
        if weight_VD.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(hidden_BD, weight_VD, None, "none", [], "")
        return matmul(hidden_BD, weight_VD.to(hidden_BD.dtype).t(), compute_dtype(hidden_BD))


class TokenLogprob(torch.autograd.Function):
    """The op around `read_rows` and `grad_rows`, or a backend's functions of the same arguments."""

    @staticmethod
    def forward(ctx, hidden_AD, weight_VD, target_A, temperature, read: Callable, grad: Callable):
        ctx.set_materialize_grads(False)
        dtype = compute_dtype(hidden_AD)
        temperature = rows_temperature(temperature, dtype)
        logprob_A = hidden_AD.new_empty(target_A.shape, dtype=dtype)
        lse_A, entropy_A = (hidden_AD.new_empty(len(target_A), dtype=dtype) for _ in range(2))

        def each_chunk(rows, logits_RV):
            logprob_A[rows], lse_A[rows], entropy_A[rows] = read(
                logits_RV, target_A[rows], of_rows(temperature, rows))

        through_chunks(hidden_AD, weight_VD, each_chunk)
        ctx.is_per_row, ctx.grad = isinstance(temperature, Tensor), grad
        ctx.temperature = None if ctx.is_per_row else temperature
        ctx.save_for_backward(hidden_AD, weight_VD, target_A, lse_A, entropy_A, *[temperature] * ctx.is_per_row)
        return logprob_A, entropy_A

    @staticmethod
    def backward(ctx, grad_logprob_A, grad_entropy_A):
        hidden_AD, weight_VD, target_A, lse_A, entropy_A, *per_row = ctx.saved_tensors
        temperature = per_row[0] if ctx.is_per_row else ctx.temperature
        if grad_logprob_A is None and grad_entropy_A is None:
            return (None,) * 6

        def each_chunk(rows, logits_RV):
            grad_logprob_R, grad_entropy_R = (None if g is None else g[rows] for g in (grad_logprob_A, grad_entropy_A))
            return ctx.grad(logits_RV, target_A[rows], lse_A[rows], entropy_A[rows], grad_logprob_R, grad_entropy_R,
                            of_rows(temperature, rows), hidden_AD.dtype)

        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        gradients = through_chunks(hidden_AD, weight_VD, each_chunk, needs_hidden=needs_hidden,
                                   needs_weight=needs_weight)
        return *gradients, None, None, None, None


def read_rows(logits_RV: Tensor, target_R: Tensor, temperature: Temperature) -> tuple[Tensor, Tensor, Tensor]:
    """logprob_R of the targets, the log-sum-exp lse_R and entropy_R of logits / temperature.

    The logits become log-probabilities, in place."""
    cool(logits_RV, temperature)
    lse_R = torch.logsumexp(logits_RV, dim=1)
    logits_RV -= lse_R[:, None]
    # an id outside the vocabulary would take the process down with it on a GPU
    known_R = target_R.clamp(0, logits_RV.shape[1] - 1)
    logprob_R = torch.where(known_R == target_R, logits_RV.gather(1, columns(known_R)).view_as(target_R), torch.nan)
    return logprob_R, lse_R, -torch.linalg.vecdot(logits_RV.exp(), logits_RV)


def grad_rows(logits_RV: Tensor, target_R: Tensor, lse_R: Tensor, entropy_R: Tensor, grad_logprob_R: Tensor | None,
              grad_entropy_R: Tensor | None, temperature: Temperature, dtype: torch.dtype) -> Tensor:
    """Gradient of the logits, in `dtype`, from what `read_rows` returned; the logits are overwritten."""
    cool(logits_RV, temperature)
    logits_RV -= lse_R[:, None]
    return grad_of_logp(logits_RV, target_R, entropy_R, grad_logprob_R, grad_entropy_R, temperature, dtype)


def grad_of_logp(logp_RV: Tensor, target_R: Tensor, entropy_R: Tensor, grad_logprob_R: Tensor | None,
                 grad_entropy_R: Tensor | None, temperature: Temperature, dtype: torch.dtype) -> Tensor:
    """Gradient of the logits, in `dtype`: g (onehot - p) / temperature for a log-probability, and
    -g p (log p + H) / temperature for an entropy.

    `logp_RV` is overwritten."""
    p_RV = logp_RV.exp()
    if grad_logprob_R is not None:
        grad_logprob_RK = (columns(grad_logprob_R) / column(temperature)).to(p_RV.dtype)
    if grad_entropy_R is None:
        p_RV *= -grad_logprob_RK.sum(dim=1, keepdim=True)
    else:
        slope_RV = logp_RV.add_(entropy_R[:, None]).mul_(grad_entropy_R[:, None] / column(temperature))
        if grad_logprob_R is not None:
            slope_RV += grad_logprob_RK.sum(dim=1, keepdim=True)
        p_RV *= slope_RV.neg_()
    if grad_logprob_R is not None:
        p_RV.scatter_add_(1, columns(target_R).clamp(0, p_RV.shape[1] - 1), grad_logprob_RK)
    return p_RV.to(dtype)


def columns(x_R: Tensor) -> Tensor:
    """[R] as [R, 1]; [R, K] as it is."""
    return x_R[:, None] if x_R.ndim == 1 else x_R
