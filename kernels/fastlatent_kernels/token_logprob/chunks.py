"""The loop of every head: the logits of a few rows at a time, and what their gradient adds to hidden and weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastlatent_kernels.check import compute_dtype
from fastlatent_kernels.library import LIBRARY

MOST_LOGITS = 160 * 2**20
"""Logits of a chunk on a GPU: 0.67 GB in float32, so that 1024 rows of a vocabulary of 152k fit."""


def through_chunks(hidden_AD: Tensor, weight_VD: Tensor, each_chunk: Callable[[slice, Tensor], Tensor | None], *,
                   needs_hidden: bool = False, needs_weight: bool = False) -> tuple[Tensor | None, Tensor | None]:
    """Call `each_chunk(rows, logits_RV)` for all rows of hidden @ weight.T; no gradient is recorded.

    Args:
        weight_VD: rounded to the dtype of `hidden_AD` once.
        each_chunk: owns its float32 logits (float64 for float64). It returns their gradient in the dtype of `hidden_AD`
            where a gradient is needed.

    Returns:
        Gradients of `hidden_AD` and `weight_VD` in their own dtypes, that of the weight accumulated in float32; None
        where not needed.
    """
    dtype, w_VD = compute_dtype(hidden_AD), weight_VD.to(hidden_AD.dtype)
    grad_hidden_AD = torch.empty_like(hidden_AD) if needs_hidden else None
    grad_weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if needs_weight else None
    for rows in _row_chunks(hidden_AD, weight_VD.shape[0]):
        grad_RV = each_chunk(rows, matmul(hidden_AD[rows], w_VD.t(), dtype))
        if needs_hidden:
            # not straight into half precision, in which a GPU's library may then add up what it summed in pieces of V
            grad_hidden_AD[rows] = matmul(grad_RV, w_VD, dtype)
        if needs_weight:
            _accumulate(grad_weight_VD, grad_RV.t(), hidden_AD[rows])
        del grad_RV  # it may lie over its logits, which the next chunk's would be made beside
    return grad_hidden_AD, grad_weight_VD.to(weight_VD.dtype) if needs_weight else None


def matmul(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in `dtype`; on CUDA straight from the float32 accumulators of a half-precision GEMM."""
    if left.is_cuda and left.dtype != dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


def _accumulate(into_VD: Tensor, left_VR: Tensor, right_RD: Tensor) -> None:
    """into += left @ right, summed in the dtype of `into`."""
    if left_VR.is_cuda and left_VR.dtype != into_VD.dtype:
        torch.ops.fastlatent.add_product(into_VD, left_VR, right_RD)
    else:
        into_VD.addmm_(left_VR.to(into_VD.dtype), right_RD.to(into_VD.dtype))


# an operator of ours: torch 2.11 cannot trace addmm with an out_dtype (https://github.com/pytorch/pytorch/issues/163880)
LIBRARY.define("add_product(Tensor(a!) into, Tensor left, Tensor right) -> ()")


def _add_product(into_VD, left_VR, right_RD):
    # adds in the GEMM's own epilogue: a product of its own would be as large as the weights
    torch.addmm(into_VD, left_VR, right_RD, out_dtype=into_VD.dtype, out=into_VD)


LIBRARY.impl("add_product", _add_product, "CUDA")
torch.library.register_fake("fastlatent::add_product", lambda into_VD, left_VR, right_RD: None, lib=LIBRARY)


def chunk_rows(num_rows: int, vocab_size: int, is_cuda: bool) -> int:
    """Rows per GEMM: few enough that a chunk is at most an eighth of the rows (or 64), enough to feed the device."""
    # a CPU wants its chunk near its cache; a GPU wants the weights read few times, within MOST_LOGITS
    most = max(64, min(2048, MOST_LOGITS // vocab_size // 64 * 64)) if is_cuda else 128
    return max(64, min(most, num_rows // 8))


def _row_chunks(hidden_AD: Tensor, vocab_size: int) -> list[slice]:
    num_rows = hidden_AD.shape[0]
    size = chunk_rows(num_rows, vocab_size, hidden_AD.is_cuda)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
