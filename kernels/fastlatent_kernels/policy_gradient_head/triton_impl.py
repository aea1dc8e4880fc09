"""policy_gradient_head around library GEMMs: one kernel makes a chunk of logits their loss and, in place, gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlatent_kernels.aot import Compile
from fastlatent_kernels.clipped_surrogate import STATS
from fastlatent_kernels.clipped_surrogate.triton_impl import NUM_STATS, kernel_options, surrogate_token
from fastlatent_kernels.library import LIBRARY
from fastlatent_kernels.policy_gradient_head import policy_gradient_head, run_head
from fastlatent_kernels.token_logprob.triton_impl import (
    NUM_WARPS, QWEN, block_size, grad_view, read_row, target_logit, write_row)
from fastlatent_kernels.triton_support import why_not_triton


@triton.jit
def loss_rows_kernel(logits_ptr, grad_ptr, target_ptr, old_ptr, ref_ptr, advantage_ptr, weight_ptr, logprob_ptr,
                     entropy_ptr, sums_ptr, grad_stride, vocab_size, inv_temperature, ratio_low, ratio_high, dual_clip,
                     kl_coef, entropy_coef, HAS_OLD: tl.constexpr, HAS_DUAL: tl.constexpr, KL: tl.constexpr,
                     NEEDS_GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """Loss, statistics, log-probability and entropy of a row a program; with NEEDS_GRAD its logits become their
    gradient."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr, target = logits_ptr + row * vocab_size, tl.load(target_ptr + row)
    picked = target_logit(row_ptr, target, vocab_size, inv_temperature, True)
    largest, log_total, entropy = read_row(row_ptr, vocab_size, inv_temperature, BLOCK)
    logprob = picked - largest - log_total
    old, ref = logprob, logprob
    if HAS_OLD:
        old = tl.load(old_ptr + row).to(tl.float32)
    if KL > 0:
        ref = tl.load(ref_ptr + row).to(tl.float32)
    advantage, weight = tl.load(advantage_ptr + row).to(tl.float32), tl.load(weight_ptr + row).to(tl.float32)
    loss, grad_logprob, grad_entropy, stats = surrogate_token(
        logprob, old, ref, entropy, advantage, weight, ratio_low, ratio_high, dual_clip, kl_coef, entropy_coef,
        HAS_DUAL, KL)
    tl.store(logprob_ptr + row, logprob)
    tl.store(entropy_ptr + row, entropy)
    sums_ptr += row * (1 + NUM_STATS)
    tl.store(sums_ptr, loss)
    for k in tl.static_range(NUM_STATS):
        tl.store(sums_ptr + 1 + k, stats[k])
    if NEEDS_GRAD:
        write_row(row_ptr, grad_ptr + row * grad_stride, target_ptr + row, logprob_ptr, grad_logprob,
                  largest + log_total, entropy, grad_entropy, vocab_size, inv_temperature, 1, BLOCK)


LIBRARY.define(
    "loss_logit_rows(Tensor(a!) logits, Tensor target, Tensor? old, Tensor? ref, Tensor advantage, Tensor weight, "
    "float temperature, float clip_low, float clip_high, float? dual_clip, float kl_coef, str kl_estimator, "
    "float entropy_coef, ScalarType? grad_dtype) -> (Tensor logprob, Tensor entropy, Tensor sums)")


def _loss_rows(logits, target, old, ref, advantage, weight, temperature, *options_and_grad_dtype):
    *options, grad_dtype = options_and_grad_dtype
    numbers, constants = kernel_options(ref, *options)
    num_rows, vocab_size = logits.shape
    grad = logits if grad_dtype is None else grad_view(logits, grad_dtype)
    columns = [(weight if x is None else x).contiguous() for x in (target, old, ref, advantage, weight)]
    out = _empty_outputs(logits)
    loss_rows_kernel[(num_rows,)](
        logits, grad, *columns, *out, grad.stride(0), vocab_size, 1.0 / temperature, *numbers,
        HAS_OLD=old is not None, **constants, NEEDS_GRAD=grad_dtype is not None,
        BLOCK=block_size(vocab_size), num_warps=NUM_WARPS)
    return out


def _empty_outputs(logits):
    num_rows = logits.shape[0]
    return logits.new_empty(num_rows), logits.new_empty(num_rows), logits.new_empty(num_rows, 1 + len(STATS))


LIBRARY.impl("loss_logit_rows", _loss_rows, "CompositeExplicitAutograd")


@torch.library.register_fake("fastlatent::loss_logit_rows", lib=LIBRARY)
def _fake_loss_rows(logits, *arguments):
    return _empty_outputs(logits)


def _loss_of_rows(logits_RV: Tensor, target_R: Tensor, old_logprob_R: Tensor | None, ref_logprob_R: Tensor | None,
                  advantage_R: Tensor, weight_R: Tensor, temperature: float, options: tuple,
                  grad_dtype: torch.dtype | None):
    """`loss_rows` of the reference, one program a row."""
    logprob_R, entropy_R, sums_R = torch.ops.fastlatent.loss_logit_rows(
        logits_RV, target_R, old_logprob_R, ref_logprob_R, advantage_R, weight_R, temperature, *options, grad_dtype)
    sums = sums_R.sum(dim=0)
    return sums[0], sums[1:], logprob_R, entropy_R, None if grad_dtype is None else grad_view(logits_RV, grad_dtype)


def _supports(hidden_AD, weight_VD, target_A, old_logprob_A, ref_logprob_A, advantage_A, weight_A, **options):
    return why_not_triton(hidden_AD, weight_VD, target_A, old_logprob_A, ref_logprob_A, advantage_A, weight_A)


@policy_gradient_head.backend("triton", supports=_supports)
def _run(hidden_AD, weight_VD, target_A, old_logprob_A, ref_logprob_A, advantage_A, weight_A, *, temperature=1.0,
         clip_low, clip_high, dual_clip=None, kl_coef=0.0, kl_estimator="k3", entropy_coef=0.0):
    options = (clip_low, clip_high, dual_clip, kl_coef, kl_estimator, entropy_coef)
    return run_head(_loss_of_rows, hidden_AD, weight_VD, target_A, old_logprob_A, ref_logprob_A, advantage_A, weight_A,
                    temperature, options)


SIGNATURE = {
    "logits_ptr": "*fp32", "grad_ptr": "*bf16", "target_ptr": "*i64",
    **dict.fromkeys(("old_ptr", "ref_ptr", "advantage_ptr", "weight_ptr", "logprob_ptr", "entropy_ptr", "sums_ptr"),
                    "*fp32"),
    "grad_stride": "i32", "vocab_size": "i32",
    **dict.fromkeys(("inv_temperature", "ratio_low", "ratio_high", "dual_clip", "kl_coef", "entropy_coef"), "fp32"),
}
# with every option, and the plain clipped surrogate on policy
_VARIANTS = {"": {"HAS_OLD": True, "HAS_DUAL": True, "KL": 3}, " plain": {"HAS_OLD": False, "HAS_DUAL": False, "KL": 0}}
AOT = tuple(
    Compile(loss_rows_kernel, signature=SIGNATURE, num_warps=NUM_WARPS, label=label + variant, requires=requires,
            constexprs=QWEN | options | {"NEEDS_GRAD": needs_grad})
    for variant, options in _VARIANTS.items()
    for label, needs_grad, requires in (("learn", True, ("LDG.E.128", "STG.E.128")), ("look", False, ("LDG.E.128",))))
