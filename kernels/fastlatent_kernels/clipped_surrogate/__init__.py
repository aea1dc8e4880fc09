"""The clipped policy-gradient surrogate with its KL and entropy terms: the one place a policy loss is computed.

PPO's clip (arXiv:1707.06347) with separate sides (DAPO's clip-higher, arXiv:2503.14476) and the dual clip of
arXiv:1912.09729. KL estimators: http://joschu.net/blog/kl-approx.html. Log-ratios are clamped to +-20 before exp, so
that no loss overflows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastlatent_kernels.check import compute_dtype, expect, expect_number
from fastlatent_kernels.dispatch import op

STATS = ("count", "policy_loss", "kl", "entropy", "clip_low", "clip_high", "dual_clipped", "ratio", "approx_kl",
         "log_ratio_abs")
"""Sums over the tokens of non-zero weight: their number; the weighted surrogate without its KL and entropy terms; the
KL to the reference (0 without one); entropy; tokens clipped below, above and by the dual clip; ratios; the k3 estimate
of KL(old || new); |log ratio|."""

KL_ESTIMATORS = ("k1", "k2", "k3")
_MAX_LOG_RATIO = 20.0


class Surrogate(NamedTuple):
    loss: Tensor  # scalar, float32 (float64 for float64 inputs), differentiable
    stats: Tensor  # [len(STATS)] in the same dtype, detached


def _check(logprob_A, old_logprob_A, ref_logprob_A, entropy_A, advantage_A, weight_A, **options) -> None:
    expect("logprob_A", logprob_A, ("A",))
    check_columns(logprob_A, old_logprob_A=old_logprob_A, ref_logprob_A=ref_logprob_A, entropy_A=entropy_A,
                  advantage_A=advantage_A, weight_A=weight_A)
    check_options(ref_logprob_A, **options)


def check_columns(like_A: Tensor, **columns_A: Tensor | None) -> None:
    """ValueError naming the first column that is no floating [A] tensor beside `like_A`; old and ref may be None."""
    for name, column_A in columns_A.items():
        if column_A is not None or name not in ("old_logprob_A", "ref_logprob_A"):
            expect(name, column_A, tuple(like_A.shape), like=like_A)


def check_options(ref_logprob_A: Tensor | None, *, clip_low, clip_high, dual_clip=None, kl_coef=0.0,
                  kl_estimator="k3", entropy_coef=0.0) -> None:
    """ValueError naming the first option of the surrogate that is wrong."""
    expect_number("clip_low", clip_low, "a number in [0, 1]", 0 <= clip_low <= 1)
    expect_number("clip_high", clip_high, "a number >= 0", clip_high >= 0)
    if dual_clip is not None:
        expect_number("dual_clip", dual_clip, "None or a number above 1", dual_clip > 1)
    if kl_estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator: expected {', '.join(KL_ESTIMATORS)}, got {kl_estimator!r}")
    if kl_coef != 0 and ref_logprob_A is None:
        raise ValueError("ref_logprob_A: expected a tensor because kl_coef is not 0, got None")
    for name, coef in (("kl_coef", kl_coef), ("entropy_coef", entropy_coef)):
        expect_number(name, coef, "a finite number", math.isfinite(coef))


@op(backends=("triton",), check=_check)
def clipped_surrogate(
        logprob_A: Tensor, old_logprob_A: Tensor | None, ref_logprob_A: Tensor | None, entropy_A: Tensor,
        advantage_A: Tensor, weight_A: Tensor, *, clip_low: float, clip_high: float, dual_clip: float | None = None,
        kl_coef: float = 0.0, kl_estimator: str = "k3", entropy_coef: float = 0.0) -> Surrogate:
    """Loss sum_A weight * (-min(ratio A, clip(ratio, 1 - low, 1 + high) A) + kl_coef KL - entropy_coef H).

    Args:
        old_logprob_A: None means on policy: ratio = exp(logprob - stopgrad(logprob)), whose value is 1.
        weight_A: already divided by whatever the step is normalised with; 0 takes the token out of everything.
        dual_clip: c bounds the loss of a negative advantage by c |A|.
        kl_estimator: k1 (log ratio), k2 (half its square) or k3 (unbiased and positive) of KL(pi || ref).

    Returns:
        `Surrogate`. The gradient reaches `logprob_A`, and `entropy_A` if entropy_coef is not 0; the rest is constant.
    """
    dtype, is_live_A = compute_dtype(logprob_A), weight_A != 0
    logprob_A, advantage_A, weight_A = logprob_A.to(dtype), advantage_A.detach().to(dtype), weight_A.detach().to(dtype)
    old_A = (logprob_A if old_logprob_A is None else old_logprob_A.to(dtype)).detach()
    log_ratio_A = (logprob_A - old_A).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio_A = torch.exp(log_ratio_A)
    gain_A = torch.minimum(ratio_A * advantage_A, ratio_A.clamp(1 - clip_low, 1 + clip_high) * advantage_A)
    is_dual_A = torch.zeros_like(is_live_A)
    if dual_clip is not None:
        floor_A = dual_clip * advantage_A
        is_dual_A = (advantage_A < 0) & (gain_A < floor_A)
        gain_A = torch.where(is_dual_A, floor_A, gain_A)

    loss_A = -gain_A
    kl_A = torch.zeros_like(loss_A)
    if ref_logprob_A is not None:
        kl_A = _kl(logprob_A, ref_logprob_A.detach().to(dtype), kl_estimator)
    if kl_coef != 0:
        loss_A = loss_A + kl_coef * kl_A
    if entropy_coef != 0:
        loss_A = loss_A - entropy_coef * entropy_A.to(dtype)

    with torch.no_grad():
        clip_low_A = (advantage_A < 0) & (ratio_A < 1 - clip_low)
        clip_high_A = (advantage_A > 0) & (ratio_A > 1 + clip_high)
        columns = (torch.ones_like(loss_A), -gain_A * weight_A, kl_A, entropy_A, clip_low_A, clip_high_A, is_dual_A,
                   ratio_A, torch.expm1(log_ratio_A) - log_ratio_A, log_ratio_A.abs())
        stats = torch.where(is_live_A, torch.stack([column.to(dtype) for column in columns]), 0.0).sum(dim=1)
    return Surrogate(torch.where(is_live_A, loss_A * weight_A, 0.0).sum(), stats)


def _kl(logprob_A: Tensor, ref_A: Tensor, estimator: str) -> Tensor:
    to_ref_A = ref_A - logprob_A
    if estimator == "k1":
        return -to_ref_A
    if estimator == "k2":
        return to_ref_A.square() / 2
    to_ref_A = to_ref_A.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return torch.expm1(to_ref_A) - to_ref_A
