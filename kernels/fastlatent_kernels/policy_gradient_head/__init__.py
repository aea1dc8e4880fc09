"""The language-model head and the clipped surrogate in one: loss, statistics and gradient in three GEMMs' time.

Each term of the loss depends on one row of logits only, so the gradient of a row is made in the forward pass, while its
logits exist, and backward only scales it. `token_logprob` then `clipped_surrogate` is the same at a GEMM more: it is
what a loss needs whose ratios join the tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastlatent_kernels.check import compute_dtype, expect, expect_ids, expect_number
from fastlatent_kernels.clipped_surrogate import STATS, check_columns, check_options, clipped_surrogate
from fastlatent_kernels.dispatch import op
from fastlatent_kernels.token_logprob import check_head, grad_of_logp, read_rows
from fastlatent_kernels.token_logprob.chunks import through_chunks


class PolicyGradient(NamedTuple):
    loss: Tensor  # scalar, float32 (float64 for float64), differentiable once in hidden and weight
    stats: Tensor  # [len(STATS)], the sums of clipped_surrogate, detached
    logprob_A: Tensor  # of the targets, detached
    entropy_A: Tensor  # in nats, detached


def _check(hidden_AD, weight_VD, target_A, old_logprob_A, ref_logprob_A, advantage_A, weight_A, *, temperature=1.0,
           **options) -> None:
    check_head(hidden_AD, weight_VD, target_A)
    expect("target_A", target_A, (len(hidden_AD),), (torch.int64,))
    expect_number("temperature", temperature, "a number above 0", not isinstance(temperature, Tensor) and temperature > 0)
    check_columns(target_A, old_logprob_A=old_logprob_A, ref_logprob_A=ref_logprob_A, advantage_A=advantage_A,
                  weight_A=weight_A)
    check_options(ref_logprob_A, **options)


@op(backends=("triton",), check=_check)
def policy_gradient_head(
        hidden_AD: Tensor, weight_VD: Tensor, target_A: Tensor, old_logprob_A: Tensor | None,
        ref_logprob_A: Tensor | None, advantage_A: Tensor, weight_A: Tensor, *, temperature: float = 1.0,
        clip_low: float, clip_high: float, dual_clip: float | None = None, kl_coef: float = 0.0,
        kl_estimator: str = "k3", entropy_coef: float = 0.0) -> PolicyGradient:
    """`clipped_surrogate` of the `token_logprob` of `target_A`, whose arguments these are, without [A, V] logits.

    Args:
        weight_A: of each token in the loss, already divided by what the step is normalised with; it may not depend on
            the log-probabilities.

    Returns:
        `PolicyGradient`. Without an input that requires gradient only the logits are computed: one GEMM.
    """
    expect_ids("target_A", target_A, len(weight_VD))
    options = (clip_low, clip_high, dual_clip, kl_coef, kl_estimator, entropy_coef)
    return run_head(loss_rows, hidden_AD, weight_VD, target_A, old_logprob_A, ref_logprob_A, advantage_A, weight_A,
                    temperature, options)


def run_head(rows: Callable, hidden_AD: Tensor, weight_VD: Tensor, *arguments) -> PolicyGradient:
    """The op around `loss_rows`, or a backend's function of the same arguments."""
    needs = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden_AD, weight_VD)]
    return PolicyGradient(*_PolicyGradientHead.apply(hidden_AD, weight_VD, *arguments, rows, *needs))


class _PolicyGradientHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_AD, weight_VD, target_A, old_logprob_A, ref_logprob_A, advantage_A, weight_A, temperature,
                options, rows_loss, needs_hidden, needs_weight):
        ctx.set_materialize_grads(False)
        dtype = compute_dtype(hidden_AD)
        loss, stats = hidden_AD.new_zeros((), dtype=dtype), hidden_AD.new_zeros(len(STATS), dtype=dtype)
        logprob_A, entropy_A = (hidden_AD.new_empty(len(target_A), dtype=dtype) for _ in range(2))
        grad_dtype = hidden_AD.dtype if needs_hidden or needs_weight else None

        def each_chunk(rows, logits_RV):
            nonlocal loss, stats
            columns_R = [None if column_A is None else column_A[rows]
                         for column_A in (target_A, old_logprob_A, ref_logprob_A, advantage_A, weight_A)]
            more_loss, more_stats, logprob_A[rows], entropy_A[rows], grad_RV = rows_loss(
                logits_RV, *columns_R, temperature, options, grad_dtype)
            # out of place: compiled by torch 2.11, a Function whose output was changed in place has gradients of 0
            # (https://github.com/pytorch/pytorch/issues/180642)
            loss, stats = loss + more_loss, stats + more_stats
            return grad_RV

        gradients = through_chunks(hidden_AD, weight_VD, each_chunk, needs_hidden=needs_hidden,
                                   needs_weight=needs_weight)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(stats, logprob_A, entropy_A)
        return loss, stats, logprob_A, entropy_A

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        gradients = (None, None)
        if grad_loss is not None:
            gradients = [None if saved is None else saved * grad_loss for saved in ctx.saved_tensors]
        return *gradients, *(None,) * 10


def loss_rows(logits_RV: Tensor, target_R: Tensor, old_logprob_R: Tensor | None, ref_logprob_R: Tensor | None,
              advantage_R: Tensor, weight_R: Tensor, temperature: float, options: tuple,
              grad_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Loss, stats, logprob_R and entropy_R of these rows, and the gradient of their logits in `grad_dtype`, or None if
    that is None. The logits are overwritten."""
    clip_low, clip_high, dual_clip, kl_coef, kl_estimator, entropy_coef = options
    logprob_R, _, entropy_R = read_rows(logits_RV, target_R, temperature)

    def surrogate(logprob_R, entropy_R):
        return clipped_surrogate.reference(
            logprob_R, old_logprob_R, ref_logprob_R, entropy_R, advantage_R, weight_R, clip_low=clip_low,
            clip_high=clip_high, dual_clip=dual_clip, kl_coef=kl_coef, kl_estimator=kl_estimator,
            entropy_coef=entropy_coef)

    if grad_dtype is None:
        return *surrogate(logprob_R, entropy_R), logprob_R, entropy_R, None
    # the derivative is autograd's: torch.func, because torch.compile follows it here and not torch.autograd
    slopes, (loss, stats) = torch.func.grad_and_value(surrogate, argnums=(0, 1), has_aux=True)(logprob_R, entropy_R)
    grad_RV = grad_of_logp(logits_RV, target_R, entropy_R, slopes[0], slopes[1] if entropy_coef != 0 else None,
                           temperature, grad_dtype)
    return loss, stats, logprob_R, entropy_R, grad_RV
