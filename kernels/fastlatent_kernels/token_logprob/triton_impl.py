"""token_logprob around library GEMMs: one Triton pass reads a row of logits, another makes it its own gradient.

A row of half-precision gradients is written over the front half of its own float32 logits, so that a chunk takes four
bytes a logit and not six.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlatent_kernels.aot import Compile
from fastlatent_kernels.library import LIBRARY
from fastlatent_kernels.token_logprob import TokenLogprob, columns, token_logprob
from fastlatent_kernels.triton_support import why_not_triton


@triton.jit
def read_row(row_ptr, vocab_size, inv_temperature, BLOCK: tl.constexpr):
    """Maximum, log-sum-exp less the maximum, and entropy of the logits at `row_ptr` times inv_temperature.

    Logits are taken relative to the running maximum, so that no digits are lost to a large one.
    """
    largest, total, weighted = -1.0e30, 0.0, 0.0
    for start in range(0, vocab_size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        is_id = index < vocab_size
        logit = tl.load(row_ptr + index, mask=is_id, other=0.0).to(tl.float32) * inv_temperature
        # finite: a masked lane adds 0 * -1e30 and not 0 * -inf to the weighted sum
        logit = tl.where(is_id, logit, -1.0e30)
        new_largest = tl.maximum(largest, tl.max(logit, axis=0))
        p = tl.exp(logit - new_largest)
        rescale = tl.exp(largest - new_largest)
        weighted = rescale * (weighted + (largest - new_largest) * total) + tl.sum(p * (logit - new_largest), axis=0)
        total = rescale * total + tl.sum(p, axis=0)
        largest = new_largest
    log_total = tl.log(total)
    return largest, log_total, log_total - weighted / total


@triton.jit
def target_logit(row_ptr, target, vocab_size, inv_temperature, is_target):
    """NaN for an id outside the vocabulary: it has no log-probability, and the loss must show it.

    To be called before `write_row`, whose first barrier keeps it from meeting a gradient here.
    """
    is_id = is_target & (target >= 0) & (target < vocab_size)
    return tl.load(row_ptr + target, mask=is_id, other=float("nan")).to(tl.float32) * inv_temperature


@triton.jit
def write_row(row_ptr, grad_row_ptr, target_ptr, grad_logprob_ptr, grad_logprob, lse, entropy, grad_entropy,
              vocab_size, inv_temperature, NUM_TARGETS: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of the logits, written over them; `grad_row_ptr` is the row itself, perhaps as a narrower type.

    `grad_logprob` is the sum over the targets; it is that of the only target where there is one, and
    `grad_logprob_ptr` is then not read.
    """
    grad_logprob *= inv_temperature
    grad_entropy *= inv_temperature
    if (NUM_TARGETS == 1) & (grad_logprob == 0) & (grad_entropy == 0):
        tl.debug_barrier()  # another warp may still be reading the row
        for start in range(0, vocab_size, BLOCK):
            index = start + tl.arange(0, BLOCK)
            tl.store(grad_row_ptr + index, tl.zeros([BLOCK], grad_row_ptr.dtype.element_ty), mask=index < vocab_size)
    else:
        for start in range(0, vocab_size, BLOCK):
            index = start + tl.arange(0, BLOCK)
            is_id = index < vocab_size
            logit = tl.load(row_ptr + index, mask=is_id, other=0.0).to(tl.float32) * inv_temperature
            logp = logit - lse
            grad = -tl.exp(logp) * (grad_logprob + grad_entropy * (logp + entropy))
            for k in tl.static_range(NUM_TARGETS):
                amount = grad_logprob
                if NUM_TARGETS > 1:
                    amount = tl.load(grad_logprob_ptr + k) * inv_temperature
                grad += tl.where(index == tl.load(target_ptr + k), amount, 0.0)
            # A half-precision element i is stored over logit i // 2, which another warp may not have loaded yet. After
            # the barrier the loads of this block and of all before it are over, and its stores reach no later one.
            tl.debug_barrier()
            tl.store(grad_row_ptr + index, grad.to(grad_row_ptr.dtype.element_ty), mask=is_id)


@triton.jit
def read_rows_kernel(logits_ptr, target_ptr, inv_temperature_ptr, logprob_ptr, lse_ptr, entropy_ptr, vocab_size,
                     NUM_TARGETS: tl.constexpr, PADDED_TARGETS: tl.constexpr, BLOCK: tl.constexpr):
    """A program a row: log-probabilities [rows, NUM_TARGETS], log-sum-exp and entropy [rows]."""
    row = tl.program_id(0).to(tl.int64)
    inv_temperature = tl.load(inv_temperature_ptr + row)
    row_ptr = logits_ptr + row * vocab_size
    k = tl.arange(0, PADDED_TARGETS)
    at = row * NUM_TARGETS + k
    target = tl.load(target_ptr + at, mask=k < NUM_TARGETS, other=0)
    picked = target_logit(row_ptr, target, vocab_size, inv_temperature, k < NUM_TARGETS)
    largest, log_total, entropy = read_row(row_ptr, vocab_size, inv_temperature, BLOCK)
    tl.store(logprob_ptr + at, picked - largest - log_total, mask=k < NUM_TARGETS)
    tl.store(lse_ptr + row, largest + log_total)
    tl.store(entropy_ptr + row, entropy)


@triton.jit
def grad_rows_kernel(logits_ptr, grad_ptr, target_ptr, lse_ptr, entropy_ptr, grad_logprob_ptr, grad_entropy_ptr,
                     inv_temperature_ptr, grad_stride, vocab_size, NUM_TARGETS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    grad_logprob = 0.0
    for k in tl.static_range(NUM_TARGETS):
        grad_logprob += tl.load(grad_logprob_ptr + row * NUM_TARGETS + k)
    write_row(logits_ptr + row * vocab_size, grad_ptr + row * grad_stride, target_ptr + row * NUM_TARGETS,
              grad_logprob_ptr + row * NUM_TARGETS, grad_logprob, tl.load(lse_ptr + row), tl.load(entropy_ptr + row),
              tl.load(grad_entropy_ptr + row), vocab_size, tl.load(inv_temperature_ptr + row), NUM_TARGETS, BLOCK)


def block_size(vocab_size: int) -> int:
    """Ids a program takes at a time: 16 to a thread of its eight warps."""
    return min(4096, triton.next_power_of_2(vocab_size))


NUM_WARPS = 8


def grad_view(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient [R, V] where kernels write it: the front of each row of `logits`."""
    return logits.view(dtype)[:, :logits.shape[1]]


LIBRARY.define("read_logit_rows(Tensor logits, Tensor target, Tensor temperature) -> "
               "(Tensor logprob, Tensor lse, Tensor entropy)")
LIBRARY.define("grad_logit_rows(Tensor(a!) logits, Tensor target, Tensor lse, Tensor entropy, Tensor grad_logprob, "
               "Tensor grad_entropy, Tensor temperature, ScalarType dtype) -> ()")


def _read_rows(logits, target, temperature):
    num_rows, vocab_size = logits.shape
    num_targets = columns(target).shape[1]
    out = _empty_outputs(logits, target)
    read_rows_kernel[(num_rows,)](
        logits, target.contiguous(), temperature.reciprocal(), *out, vocab_size, NUM_TARGETS=num_targets,
        PADDED_TARGETS=triton.next_power_of_2(num_targets), BLOCK=block_size(vocab_size), num_warps=NUM_WARPS)
    return out


def _empty_outputs(logits, target):
    return logits.new_empty(target.shape), logits.new_empty(len(target)), logits.new_empty(len(target))


def _grad_rows(logits, target, lse, entropy, grad_logprob, grad_entropy, temperature, dtype):
    num_rows, vocab_size = logits.shape
    grad = grad_view(logits, dtype)
    given = [x.contiguous() for x in (target, lse, entropy, grad_logprob, grad_entropy)]
    grad_rows_kernel[(num_rows,)](
        logits, grad, *given, temperature.reciprocal(), grad.stride(0), vocab_size,
        NUM_TARGETS=columns(target).shape[1], BLOCK=block_size(vocab_size), num_warps=NUM_WARPS)


LIBRARY.impl("read_logit_rows", _read_rows, "CompositeExplicitAutograd")
LIBRARY.impl("grad_logit_rows", _grad_rows, "CompositeExplicitAutograd")


@torch.library.register_fake("fastlatent::read_logit_rows", lib=LIBRARY)
def _fake_read_rows(logits, target, temperature):
    return _empty_outputs(logits, target)


@torch.library.register_fake("fastlatent::grad_logit_rows", lib=LIBRARY)
def _fake_grad_rows(logits, *arguments):
    return None


def read(logits_RV: Tensor, target_R: Tensor, temperature_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`read_rows` of the reference, in one pass."""
    return torch.ops.fastlatent.read_logit_rows(logits_RV, target_R, temperature_R)


def grad(logits_RV: Tensor, target_R: Tensor, lse_R: Tensor, entropy_R: Tensor, grad_logprob_R: Tensor | None,
         grad_entropy_R: Tensor | None, temperature_R: Tensor, dtype: torch.dtype) -> Tensor:
    """`grad_rows` of the reference, in one pass over logits that it overwrites."""
    grad_logprob_R = torch.zeros_like(target_R, dtype=lse_R.dtype) if grad_logprob_R is None else grad_logprob_R
    grad_entropy_R = torch.zeros_like(lse_R) if grad_entropy_R is None else grad_entropy_R
    torch.ops.fastlatent.grad_logit_rows(logits_RV, target_R, lse_R, entropy_R, grad_logprob_R, grad_entropy_R,
                                         temperature_R, dtype)
    return grad_view(logits_RV, dtype)


def _supports(hidden_AD, weight_VD, target_A, temperature=1.0) -> str | None:
    return why_not_triton(hidden_AD, weight_VD, target_A)


@token_logprob.backend("triton", supports=_supports)
def _run(hidden_AD, weight_VD, target_A, temperature=1.0):
    if not isinstance(temperature, Tensor):  # the kernels load one for each row
        temperature = hidden_AD.new_full((len(hidden_AD),), temperature, dtype=torch.float32)
    return TokenLogprob.apply(hidden_AD, weight_VD, target_A, temperature, read, grad)


QWEN = {"BLOCK": block_size(151936)}
AOT = (
    Compile(read_rows_kernel, signature={
        "logits_ptr": "*fp32", "target_ptr": "*i64",
        **dict.fromkeys(("inv_temperature_ptr", "logprob_ptr", "lse_ptr", "entropy_ptr"), "*fp32"),
        "vocab_size": "i32"},
        constexprs=QWEN | {"NUM_TARGETS": 1, "PADDED_TARGETS": 1}, num_warps=NUM_WARPS, requires=("LDG.E.128",)),
    *(Compile(grad_rows_kernel, signature={
        "logits_ptr": "*fp32", "grad_ptr": "*bf16", "target_ptr": "*i64",
        **dict.fromkeys(("lse_ptr", "entropy_ptr", "grad_logprob_ptr", "grad_entropy_ptr", "inv_temperature_ptr"),
                        "*fp32"),
        "grad_stride": "i32", "vocab_size": "i32"},
        constexprs=QWEN | {"NUM_TARGETS": num_targets}, num_warps=NUM_WARPS, label=f"{num_targets}-targets",
        requires=("LDG.E.128", "STG.E.128")) for num_targets in (1, 8)),
)
