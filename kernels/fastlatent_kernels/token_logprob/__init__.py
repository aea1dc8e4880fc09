"""Log-probability and entropy of given tokens straight from hidden states; the [A, V] logits never exist at once.

Logits are made for a few rows at a time and made again in the backward pass: a GEMM more, A * V floats less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlatent_kernels.check import compute_dtype, expect, expect_number
from fastlatent_kernels.dispatch import op


def _check(hidden_AD, weight_VD, target_A, temperature=1.0) -> None:
    expect("hidden_AD", hidden_AD, ("A", "D"))
    A, D = hidden_AD.shape
    expect("weight_VD", weight_VD, ("V", D), like=hidden_AD)
    expect("target_A", target_A, (A,), (torch.int64,), like=hidden_AD)
    expect_number("temperature", temperature, "a number above 0", temperature > 0)


@op(check=_check)
def token_logprob(
        hidden_AD: Tensor, weight_VD: Tensor, target_A: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under softmax(hidden @ weight.T / temperature), and its entropy in nats.

    Args:
        hidden_AD: its dtype is that of the GEMMs; logits and all that follows are float32 (float64 for float64).
        weight_VD: may be a float32 master of a bfloat16 model: it is rounded to the dtype of `hidden_AD` once per
            call, and its gradient, accumulated in float32, comes back in its own dtype.

    Returns:
        logprob_A and entropy_A, float32, both differentiable in hidden and weight.
    """
    return _TokenLogprob.apply(hidden_AD, weight_VD, target_A, temperature)


def head_logits(hidden_BD: Tensor, weight_VD: Tensor) -> Tensor:
    """hidden @ weight.T [B, V] in float32 (float64 for float64), without gradient.

    On CUDA a half-precision GEMM writes its float32 accumulators; on a CPU its results come rounded to half precision.
    """
    with torch.no_grad():
        return _matmul(hidden_BD, weight_VD.to(hidden_BD.dtype).t(), compute_dtype(hidden_BD))


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_AD, weight_VD, target_A, temperature):
        ctx.set_materialize_grads(False)
        dtype, w_VD = compute_dtype(hidden_AD), weight_VD.to(hidden_AD.dtype)
        logprob_A, lse_A, entropy_A = (hidden_AD.new_empty(len(target_A), dtype=dtype) for _ in range(3))
        for rows in _row_chunks(hidden_AD, weight_VD.shape[0]):
            logits_RV = _scaled_logits(hidden_AD[rows], w_VD, temperature)
            target_R1 = target_A[rows, None]
            picked_R = logits_RV.gather(1, target_R1)[:, 0]
            lse_R = torch.logsumexp(logits_RV, dim=1)
            logprob_A[rows], lse_A[rows] = picked_R - lse_R, lse_R
            logits_RV -= lse_R[:, None]
            entropy_A[rows] = -torch.linalg.vecdot(logits_RV.exp(), logits_RV)
        ctx.save_for_backward(hidden_AD, weight_VD, target_A, lse_A, entropy_A)
        ctx.temperature = temperature
        return logprob_A, entropy_A

    @staticmethod
    def backward(ctx, grad_logprob_A, grad_entropy_A):
        hidden_AD, weight_VD, target_A, lse_A, entropy_A = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        if grad_logprob_A is None and grad_entropy_A is None:
            return None, None, None, None
        dtype, w_VD = compute_dtype(hidden_AD), weight_VD.to(hidden_AD.dtype)
        grad_hidden_AD = torch.empty_like(hidden_AD) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if needs_weight else None
        for rows in _row_chunks(hidden_AD, weight_VD.shape[0]):
            logp_RV = _scaled_logits(hidden_AD[rows], w_VD, ctx.temperature).sub_(lse_A[rows, None])
            grad_RV = _grad_logits(logp_RV, target_A[rows], entropy_A[rows],
                                   None if grad_logprob_A is None else grad_logprob_A[rows] / ctx.temperature,
                                   None if grad_entropy_A is None else grad_entropy_A[rows] / ctx.temperature)
            grad_RV = grad_RV.to(hidden_AD.dtype)
            if needs_hidden:
                grad_hidden_AD[rows] = grad_RV @ w_VD
            if needs_weight:
                _accumulate(grad_weight_VD, grad_RV.t(), hidden_AD[rows])
        return grad_hidden_AD, grad_weight_VD.to(weight_VD.dtype) if needs_weight else None, None, None


def _grad_logits(logp_RV: Tensor, target_R: Tensor, entropy_R: Tensor, grad_logprob_R: Tensor | None,
                 grad_entropy_R: Tensor | None) -> Tensor:
    """Gradient of the scaled logits: g (onehot - p) for a log-probability, -g p (log p + H) for an entropy.

    `logp_RV` is overwritten."""
    p_RV = logp_RV.exp()
    if grad_entropy_R is None:
        p_RV *= -grad_logprob_R[:, None]
    else:
        slope_RV = logp_RV.add_(entropy_R[:, None]).mul_(grad_entropy_R[:, None])
        if grad_logprob_R is not None:
            slope_RV += grad_logprob_R[:, None]
        p_RV *= slope_RV.neg_()
    if grad_logprob_R is not None:
        p_RV.scatter_add_(1, target_R[:, None], grad_logprob_R[:, None].to(p_RV.dtype))
    return p_RV


def _scaled_logits(hidden_RD: Tensor, w_VD: Tensor, temperature: float) -> Tensor:
    logits_RV = _matmul(hidden_RD, w_VD.t(), compute_dtype(hidden_RD))
    return logits_RV if temperature == 1.0 else logits_RV.div_(temperature)


def _matmul(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in `dtype`; on CUDA straight from the float32 accumulators of a half-precision GEMM."""
    if left.is_cuda and left.dtype != dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


def _accumulate(into_VD: Tensor, left_VR: Tensor, right_RD: Tensor) -> None:
    """into += left @ right, summed in the dtype of `into`."""
    if left_VR.is_cuda and left_VR.dtype != into_VD.dtype:
        into_VD += torch.mm(left_VR, right_RD, out_dtype=into_VD.dtype)
    else:
        into_VD.addmm_(left_VR.to(into_VD.dtype), right_RD.to(into_VD.dtype))


def _row_chunks(hidden_AD: Tensor, vocab_size: int) -> list[slice]:
    """Rows per GEMM: few enough that a chunk is at most an eighth of the rows (or 64), enough to feed the device."""
    num_rows = hidden_AD.shape[0]
    # a CPU wants its chunk near its cache; a GPU wants the weights read few times, within 2**28 logits
    most = max(64, min(2048, 2**28 // vocab_size)) if hidden_AD.is_cuda else 128
    size = max(64, min(most, num_rows // 8))
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
