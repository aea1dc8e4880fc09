"""Weighted sums of embedding rows: a latent input given by a few token ids and their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlatent_kernels.check import compute_dtype, expect
from fastlatent_kernels.dispatch import op

_ROWS = 512  # bounds the gathered [rows, K, D] of a long batch


def _check(ids_NK, weight_NK, table_VD) -> None:
    expect("table_VD", table_VD, ("V", "D"))
    expect("ids_NK", ids_NK, ("N", "K"), (torch.int64, torch.int32), like=table_VD)
    expect("weight_NK", weight_NK, tuple(ids_NK.shape), like=table_VD)


@op(backends=("triton", "native"), check=_check)
def soft_embedding(ids_NK: Tensor, weight_NK: Tensor, table_VD: Tensor) -> Tensor:
    """`out[n] = sum_k weight[n, k] * table[ids[n, k]]`, [N, D] in the dtype of the table, summed in float32.

    Differentiable in the weights and the table. An id may repeat; a weight of 0 drops its id.
    """
    chunks = zip(ids_NK.split(_ROWS), weight_NK.split(_ROWS), strict=True)
    parts = [_mix(ids, weight, table_VD) for ids, weight in chunks]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _mix(ids_NK: Tensor, weight_NK: Tensor, table_VD: Tensor) -> Tensor:
    dtype = compute_dtype(table_VD)
    rows_NKD = torch.nn.functional.embedding(ids_NK, table_VD).to(dtype)
    return torch.bmm(weight_NK.to(dtype)[:, None, :], rows_NKD)[:, 0].to(table_VD.dtype)
