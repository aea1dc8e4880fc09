"""The surrogate's one Triton device function, and the op that runs it over given log-probabilities in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlatent_kernels.aot import Compile
from fastlatent_kernels.check import compute_dtype
from fastlatent_kernels.clipped_surrogate import KL_ESTIMATORS, STATS, Surrogate, clipped_surrogate
from fastlatent_kernels.library import LIBRARY
from fastlatent_kernels.triton_support import expm1, why_not_triton

NUM_STATS = tl.constexpr(len(STATS))
BLOCK = 1024


@triton.jit
def surrogate_token(logprob, old, ref, entropy, advantage, weight, ratio_low, ratio_high, dual_clip, kl_coef,
                    entropy_coef, HAS_DUAL: tl.constexpr, KL: tl.constexpr):
    """The clipped surrogate of tokens, all arguments float32 scalars or blocks.

    Args:
        ref: ignored where KL is 0.
        ratio_low, ratio_high: 1 - clip_low, 1 + clip_high.
        KL: number of the estimator, or 0 without a reference.

    Returns:
        The weighted loss, its derivatives by logprob and entropy, and the statistics in the order of STATS; all 0 where
        weight is.
    """
    is_live = weight != 0
    # comparisons and not tl.minimum, which loses a NaN: a broken log-probability has to show in the loss
    raw = logprob - old
    log_ratio = tl.where(raw > 20.0, 20.0, tl.where(raw < -20.0, -20.0, raw))
    ratio = tl.exp(log_ratio)
    is_low = (advantage < 0) & (ratio < ratio_low)
    is_high = (advantage > 0) & (ratio > ratio_high)
    gain = tl.where(is_low, ratio_low, tl.where(is_high, ratio_high, ratio)) * advantage
    is_dual = tl.zeros_like(is_low)
    if HAS_DUAL:
        is_dual = (advantage < 0) & (gain < dual_clip * advantage)
        gain = tl.where(is_dual, dual_clip * advantage, gain)
    is_flat = is_low | is_high | is_dual | (tl.abs(raw) > 20.0)
    slope = tl.where(is_flat, 0.0, -ratio * advantage)
    kl = tl.zeros_like(gain)
    if KL > 0:
        to_ref = ref - logprob
        if KL == 1:
            kl, kl_slope = -to_ref, tl.zeros_like(gain) + 1.0
        elif KL == 2:
            kl, kl_slope = to_ref * to_ref * 0.5, -to_ref
        else:
            near = tl.where(to_ref > 20.0, 20.0, tl.where(to_ref < -20.0, -20.0, to_ref))
            growth = expm1(near)
            kl, kl_slope = growth - near, tl.where(tl.abs(to_ref) > 20.0, 0.0, -growth)
        slope += kl_coef * kl_slope
    # an entropy nobody asks for may be anything, 0 * inf included
    bonus = tl.where(entropy_coef != 0, entropy_coef * entropy, 0.0)
    loss = -gain + tl.where(kl_coef != 0, kl_coef * kl, 0.0) - bonus
    stats = (tl.where(is_live, 1.0, 0.0), tl.where(is_live, -gain * weight, 0.0), tl.where(is_live, kl, 0.0),
             tl.where(is_live, entropy, 0.0), tl.where(is_live & is_low, 1.0, 0.0),
             tl.where(is_live & is_high, 1.0, 0.0), tl.where(is_live & is_dual, 1.0, 0.0),
             tl.where(is_live, ratio, 0.0), tl.where(is_live, expm1(log_ratio) - log_ratio, 0.0),
             tl.where(is_live, tl.abs(log_ratio), 0.0))
    return (tl.where(is_live, loss * weight, 0.0), tl.where(is_live, slope * weight, 0.0),
            tl.where(is_live, -entropy_coef * weight, 0.0), stats)


@triton.jit
def surrogate_kernel(logprob_ptr, old_ptr, ref_ptr, entropy_ptr, advantage_ptr, weight_ptr, sums_ptr,
                     grad_logprob_ptr, grad_entropy_ptr, num_tokens, ratio_low, ratio_high, dual_clip, kl_coef,
                     entropy_coef, HAS_OLD: tl.constexpr, HAS_DUAL: tl.constexpr, KL: tl.constexpr,
                     BLOCK: tl.constexpr):
    """sums [programs, 1 + len(STATS)] and the two derivatives [num_tokens], read and written once."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_token = token < num_tokens
    logprob = tl.load(logprob_ptr + token, mask=is_token, other=0.0).to(tl.float32)
    old = logprob
    if HAS_OLD:
        old = tl.load(old_ptr + token, mask=is_token, other=0.0).to(tl.float32)
    ref = logprob
    if KL > 0:
        ref = tl.load(ref_ptr + token, mask=is_token, other=0.0).to(tl.float32)
    entropy = tl.load(entropy_ptr + token, mask=is_token, other=0.0).to(tl.float32)
    advantage = tl.load(advantage_ptr + token, mask=is_token, other=0.0).to(tl.float32)
    # other=0.0 makes a masked lane a token of no weight
    weight = tl.load(weight_ptr + token, mask=is_token, other=0.0).to(tl.float32)
    loss, grad_logprob, grad_entropy, stats = surrogate_token(
        logprob, old, ref, entropy, advantage, weight, ratio_low, ratio_high, dual_clip, kl_coef, entropy_coef,
        HAS_DUAL, KL)
    sums_ptr += tl.program_id(0) * (1 + NUM_STATS)
    tl.store(sums_ptr, tl.sum(loss, axis=0))
    for k in tl.static_range(NUM_STATS):
        tl.store(sums_ptr + 1 + k, tl.sum(stats[k], axis=0))
    tl.store(grad_logprob_ptr + token, grad_logprob.to(grad_logprob_ptr.dtype.element_ty), mask=is_token)
    tl.store(grad_entropy_ptr + token, grad_entropy.to(grad_entropy_ptr.dtype.element_ty), mask=is_token)


def kernel_options(ref_logprob: Tensor | None, clip_low: float, clip_high: float, dual_clip: float | None,
                   kl_coef: float, kl_estimator: str, entropy_coef: float) -> tuple[tuple[float, ...], dict]:
    """The options of the op as `surrogate_token` takes them: its five numbers, then HAS_DUAL and KL."""
    numbers = 1 - clip_low, 1 + clip_high, dual_clip or 0.0, kl_coef, entropy_coef
    kl = 0 if ref_logprob is None else 1 + KL_ESTIMATORS.index(kl_estimator)
    return numbers, {"HAS_DUAL": dual_clip is not None, "KL": kl}


LIBRARY.define(
    "surrogate_sums(Tensor logprob, Tensor? old, Tensor? ref, Tensor entropy, Tensor advantage, Tensor weight, "
    "float clip_low, float clip_high, float? dual_clip, float kl_coef, str kl_estimator, float entropy_coef) -> "
    "(Tensor loss, Tensor stats, Tensor grad_logprob, Tensor grad_entropy)")


def _sums(logprob, old, ref, entropy, advantage, weight, *options):
    numbers, constants = kernel_options(ref, *options)
    columns = [(logprob if x is None else x).contiguous() for x in (logprob, old, ref, entropy, advantage, weight)]
    grads = torch.empty_like(columns[0]), torch.empty_like(columns[3])
    grid = (triton.cdiv(len(logprob), BLOCK),)
    sums = torch.empty(*grid, 1 + len(STATS), dtype=compute_dtype(logprob), device=logprob.device)
    if len(logprob):
        surrogate_kernel[grid](*columns, sums, *grads, len(logprob), *numbers, HAS_OLD=old is not None, **constants,
                               BLOCK=BLOCK)
    sums = sums.sum(dim=0)
    # storages of their own, for outputs of an operator may not alias
    return sums[0].clone(), sums[1:].clone(), *grads


LIBRARY.impl("surrogate_sums", _sums, "CompositeExplicitAutograd")


@torch.library.register_fake("fastlatent::surrogate_sums", lib=LIBRARY)
def _fake_sums(logprob, old, ref, entropy, advantage, weight, *options):
    dtype = compute_dtype(logprob)
    grads = (x.new_empty(x.shape) for x in (logprob, entropy))
    return logprob.new_empty((), dtype=dtype), logprob.new_empty(len(STATS), dtype=dtype), *grads


def _keep_gradients(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])
    ctx.has_bonus = inputs[-1] != 0


def _scale_gradients(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 12
    grad_logprob, grad_entropy = ctx.saved_tensors
    return (grad_logprob * grad_loss, None, None, grad_entropy * grad_loss if ctx.has_bonus else None,
            *(None,) * 8)


torch.library.register_autograd("fastlatent::surrogate_sums", _scale_gradients, setup_context=_keep_gradients,
                                lib=LIBRARY)


def _supports(logprob_A, old_logprob_A, ref_logprob_A, entropy_A, advantage_A, weight_A, **options) -> str | None:
    return why_not_triton(logprob_A, old_logprob_A, ref_logprob_A, entropy_A, advantage_A, weight_A)


@clipped_surrogate.backend("triton", supports=_supports)
def _run(logprob_A, old_logprob_A, ref_logprob_A, entropy_A, advantage_A, weight_A, *, clip_low, clip_high,
         dual_clip=None, kl_coef=0.0, kl_estimator="k3", entropy_coef=0.0):
    loss, stats, _, _ = torch.ops.fastlatent.surrogate_sums(
        logprob_A, old_logprob_A, ref_logprob_A, entropy_A, advantage_A, weight_A, clip_low, clip_high, dual_clip,
        kl_coef, kl_estimator, entropy_coef)
    return Surrogate(loss, stats)


AOT = (Compile(surrogate_kernel, signature={
    **dict.fromkeys(("logprob_ptr", "old_ptr", "ref_ptr", "entropy_ptr", "advantage_ptr", "weight_ptr", "sums_ptr",
                     "grad_logprob_ptr", "grad_entropy_ptr"), "*fp32"),
    "num_tokens": "i32",
    **dict.fromkeys(("ratio_low", "ratio_high", "dual_clip", "kl_coef", "entropy_coef"), "fp32"),
}, constexprs={"HAS_OLD": True, "HAS_DUAL": True, "KL": 3, "BLOCK": BLOCK}),)
