"""soft_embedding on a GPU: rows of the table are gathered into registers, forward and backward; no atomics."""

from __future__ import annotations

import triton
import triton.language as tl

from fastlatent_kernels.aot import Compile
from fastlatent_kernels.soft_embedding import soft_embedding
from fastlatent_kernels.soft_embedding.operators import register
from fastlatent_kernels.triton_support import why_not_triton

# 8192 elements a step: all its rows are asked for before the first is needed
_BLOCKS, _NUM_WARPS = {"BLOCK_N": 4, "BLOCK_K": 16, "BLOCK_D": 128}, 8
_TABLE_BLOCKS, _TABLE_WARPS = {"BLOCK_P": 16, "BLOCK_D": 512}, 8


@triton.jit
def forward_kernel(ids_ptr, weight_ptr, table_ptr, out_ptr, N, K, V, D, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                   BLOCK_D: tl.constexpr):
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    out_NKD = tl.zeros([BLOCK_N, BLOCK_K, BLOCK_D], tl.float32)
    for begin in range(0, K, BLOCK_K):
        at_NK, inside_NK = places(n_N, begin + tl.arange(0, BLOCK_K), N, K)
        weight_NK = tl.load(weight_ptr + at_NK, mask=inside_NK, other=0.0).to(tl.float32)
        out_NKD += weight_NK[:, :, None] * table_rows(ids_ptr + at_NK, inside_NK, table_ptr, d_D, V, D)
    at_ND = out_ptr + n_N.to(tl.int64)[:, None] * D + d_D[None, :]
    tl.store(at_ND, tl.sum(out_NKD, axis=1).to(out_ptr.dtype.element_ty), mask=(n_N < N)[:, None] & (d_D < D)[None, :])


@triton.jit
def weight_gradient_kernel(grad_ptr, ids_ptr, table_ptr, dweight_ptr, N, K, V, D, BLOCK_N: tl.constexpr,
                           BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """dweight[n, k] = grad[n] . table[ids[n, k]]"""
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at_NK, inside_NK = places(n_N, tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K), N, K)
    dot_NKD = tl.zeros([BLOCK_N, BLOCK_K, BLOCK_D], tl.float32)
    for begin in range(0, D, BLOCK_D):
        d_D = begin + tl.arange(0, BLOCK_D)
        grad_ND = tl.load(grad_ptr + n_N.to(tl.int64)[:, None] * D + d_D[None, :],
                          mask=(n_N < N)[:, None] & (d_D < D)[None, :], other=0.0).to(tl.float32)
        dot_NKD += grad_ND[:, None, :] * table_rows(ids_ptr + at_NK, inside_NK, table_ptr, d_D, V, D)
    tl.store(dweight_ptr + at_NK, tl.sum(dot_NKD, axis=2).to(dweight_ptr.dtype.element_ty), mask=inside_NK)


@triton.jit
def table_gradient_kernel(grad_ptr, weight_ptr, place_ptr, begin_ptr, dtable_ptr, K, D, BLOCK_P: tl.constexpr,
                          BLOCK_D: tl.constexpr):
    """dtable[v] = sum of weight[n, k] * grad[n] over the places of v; a program owns a piece of one row."""
    id = tl.program_id(0)
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    end = tl.load(begin_ptr + id + 1)
    sum_PD = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for begin in range(tl.load(begin_ptr + id), end, BLOCK_P):
        at_P = tl.arange(0, BLOCK_P) + begin
        place_P = tl.load(place_ptr + at_P, mask=at_P < end, other=0)
        weight_P = tl.load(weight_ptr + place_P, mask=at_P < end, other=0.0).to(tl.float32)
        grad_PD = tl.load(grad_ptr + (place_P // K)[:, None] * D + d_D[None, :],
                          mask=(at_P < end)[:, None] & (d_D < D)[None, :], other=0.0).to(tl.float32)
        sum_PD += weight_P[:, None] * grad_PD
    row_ptr = dtable_ptr + id.to(tl.int64) * D
    tl.store(row_ptr + d_D, tl.sum(sum_PD, axis=0).to(dtable_ptr.dtype.element_ty), mask=d_D < D)


@triton.jit
def places(n_N, k_K, N, K):
    """Offsets of a block of an [N, K] tensor, and which of them are inside."""
    return n_N.to(tl.int64)[:, None] * K + k_K[None, :], (n_N < N)[:, None] & (k_K < K)[None, :]


@triton.jit
def table_rows(ids_ptr_NK, inside_NK, table_ptr, d_D, V, D):
    """float32 pieces of the rows that ids name; NaN for an id that names none, 0 outside."""
    id_NK = tl.load(ids_ptr_NK, mask=inside_NK, other=0).to(tl.int64)
    is_id_NK = (id_NK >= 0) & (id_NK < V)
    row_NKD = tl.load(table_ptr + id_NK[:, :, None] * D + d_D[None, None, :],
                      mask=(inside_NK & is_id_NK)[:, :, None] & (d_D < D)[None, None, :], other=0.0).to(tl.float32)
    return tl.where(is_id_NK[:, :, None], row_NKD, float("nan"))


def _forward(ids_NK, weight_NK, table_VD, out_ND) -> None:
    (N, K), (V, D) = ids_NK.shape, table_VD.shape
    grid = triton.cdiv(N, _BLOCKS["BLOCK_N"]), triton.cdiv(D, _BLOCKS["BLOCK_D"])
    forward_kernel[grid](ids_NK, weight_NK, table_VD, out_ND, N, K, V, D, **_BLOCKS, num_warps=_NUM_WARPS)


def _weight_gradient(grad_ND, ids_NK, table_VD, dweight_NK) -> None:
    (N, K), (V, D) = ids_NK.shape, table_VD.shape
    grid = triton.cdiv(N, _BLOCKS["BLOCK_N"]), triton.cdiv(K, _BLOCKS["BLOCK_K"])
    weight_gradient_kernel[grid](grad_ND, ids_NK, table_VD, dweight_NK, N, K, V, D, **_BLOCKS, num_warps=_NUM_WARPS)


def _table_gradient(grad_ND, weight_NK, place_P, begin_U, dtable_VD) -> None:
    K, (V, D) = weight_NK.shape[1], dtable_VD.shape
    table_gradient_kernel[V, triton.cdiv(D, _TABLE_BLOCKS["BLOCK_D"])](
        grad_ND, weight_NK, place_P, begin_U, dtable_VD, K, D, **_TABLE_BLOCKS, num_warps=_TABLE_WARPS)


_embed = register("triton", ("CPU", "CUDA"), _forward, _weight_gradient, _table_gradient)


def _supports(ids_NK, weight_NK, table_VD) -> str | None:
    return why_not_triton(ids_NK, weight_NK, table_VD)


@soft_embedding.backend("triton", supports=_supports)
def _run(ids_NK, weight_NK, table_VD):
    return _embed(ids_NK, weight_NK, table_VD)


_TYPES = {"ids_ptr": "*i64", "table_ptr": "*bf16", "N": "i32", "K": "i32", "V": "i32", "D": "i32"}
AOT = (
    Compile(forward_kernel, _TYPES | {"weight_ptr": "*fp32", "out_ptr": "*bf16"}, _BLOCKS, num_warps=_NUM_WARPS,
            unaligned=("N", "K"), requires=("LDG.E.128",)),
    Compile(weight_gradient_kernel, _TYPES | {"grad_ptr": "*bf16", "dweight_ptr": "*fp32"}, _BLOCKS,
            num_warps=_NUM_WARPS, unaligned=("N", "K"), requires=("LDG.E.128",)),
    Compile(table_gradient_kernel,
            {"grad_ptr": "*bf16", "weight_ptr": "*fp32", "place_ptr": "*i64", "begin_ptr": "*i64",
             "dtable_ptr": "*bf16", "K": "i32", "D": "i32"},
            _TABLE_BLOCKS, num_warps=_TABLE_WARPS, unaligned=("K",), requires=("LDG.E.128",)),
)
