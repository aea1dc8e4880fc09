"""What the Triton backends share: when they can run, the rollout's noise, and elementary functions without libdevice.

libdevice and inline assembly do not exist in Triton's interpreter, in which the kernels are tested where there is no
GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when they were imported)."""


def why_not_triton(*tensors: Tensor | None) -> str | None:
    """None where the kernels can take these tensors, else the sentence that refuses. None entries are skipped."""
    given = [t for t in tensors if t is not None]
    if any(t.dtype not in DTYPES or t.is_mkldnn for t in given):
        return "triton takes float32, bfloat16 and float16 tensors"
    if not INTERPRETED and any(not t.is_cuda for t in given):
        return "triton takes CUDA tensors; TRITON_INTERPRET=1 runs it on a CPU, for tests"
    if not INTERPRETED and any(t.get_device() != torch.cuda.current_device() for t in given):
        return "triton takes tensors of the current CUDA device"  # on which it launches whatever the tensors' is
    return None


@triton.jit
def noise_row(seed_ptr, counter_ptr, row):
    """Key and counter words of a row (or rows): key_lo, key_hi, position, prompt, sample_word, each uint32."""
    seed = tl.load(seed_ptr)
    at = counter_ptr + row.to(tl.int64) * 3
    return (seed.to(tl.uint32), (seed >> 32).to(tl.uint32), tl.load(at).to(tl.uint32), tl.load(at + 1).to(tl.uint32),
            tl.load(at + 2).to(tl.uint32))


@triton.jit
def uniform(key_lo, key_hi, index, position, stream: tl.constexpr, prompt, sample_word):
    """`noise.uniform` bit for bit; `index` is a block that the other words broadcast to."""
    index = index.to(tl.uint32)
    zero = index * 0
    c0, c1, c2, c3 = index, zero + position.to(tl.uint32) * 4 + stream, zero + prompt, zero + sample_word
    word, _, _, _ = tl.philox_impl(c0, c1, c2, c3, key_lo, key_hi)
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def gumbel(key_lo, key_hi, index, position, stream: tl.constexpr, prompt, sample_word):
    """Standard Gumbel noise of `uniform`."""
    return -tl.log(-tl.log(uniform(key_lo, key_hi, index, position, stream, prompt, sample_word)))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def log1p(x):
    """log(1 + x) for x > -1, without cancellation near 0."""
    # the rounding of 1 + x is divided out again (Goldberg 1991, theorem 4)
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def softplus(x):
    """log(1 + exp(x))"""
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def expm1(x):
    """exp(x) - 1, without cancellation near 0."""
    series = x * (1.0 + x * 0.5 * (1.0 + x * (1.0 / 3) * (1.0 + x * 0.25 * (1.0 + x * 0.2 * (1.0 + x * (1.0 / 6))))))
    return tl.where(tl.abs(x) < 0.25, series, tl.exp(x) - 1.0)
