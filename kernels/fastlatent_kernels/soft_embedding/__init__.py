"""Weighted sums of embedding rows: a latent input given by a few token ids and their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlatent_kernels.check import compute_dtype, expect, expect_ids
from fastlatent_kernels.dispatch import op

_ROWS = 512  # bounds the gathered [rows, K, D] of a long batch


def _check(ids_NK, weight_NK, table_VD) -> None:
    expect("table_VD", table_VD, ("V", "D"))
    expect("ids_NK", ids_NK, ("N", "K"), (torch.int64, torch.int32), like=table_VD)
    expect("weight_NK", weight_NK, tuple(ids_NK.shape), like=table_VD)


@op(backends=("triton", "native"), check=_check)
def soft_embedding(ids_NK: Tensor, weight_NK: Tensor, table_VD: Tensor) -> Tensor:
    """`out[n] = sum_k weight[n, k] * table[ids[n, k]]`, [N, D] in the dtype of the table, summed in float32.

    Differentiable in the weights and the table. An id may repeat; a weight of 0 drops its id. An id that is no row of
    the table is a ValueError on a CPU; on a GPU, where nothing can be raised, it makes its row of the output NaN.
    """
    expect_ids("ids_NK", ids_NK, len(table_VD))
    chunks = zip(ids_NK.split(_ROWS), weight_NK.split(_ROWS), strict=True)
    parts = [_mix(ids, weight, table_VD) for ids, weight in chunks]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _mix(ids_NK: Tensor, weight_NK: Tensor, table_VD: Tensor) -> Tensor:
    dtype = compute_dtype(table_VD)
    # an id that is none would take the process down with it on a GPU
    known_NK = ids_NK.clamp(0, len(table_VD) - 1)
    rows_NKD = torch.nn.functional.embedding(known_NK, table_VD).to(dtype)
    weight_NK = torch.where(known_NK == ids_NK, weight_NK.to(dtype), torch.nan)
    return torch.bmm(weight_NK[:, None, :], rows_NKD)[:, 0].to(table_VD.dtype)
