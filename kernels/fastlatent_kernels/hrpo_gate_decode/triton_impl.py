"""hrpo_gate_decode in Triton: a program owns a few output columns of some rows, and both of their gate matrices.

The pre-activations never leave its registers, so they are not rounded to the dtype of the table as the reference's are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlatent_kernels.aot import Compile
from fastlatent_kernels.hrpo_gate import DECAY_SCALE
from fastlatent_kernels.hrpo_gate.triton_impl import gated
from fastlatent_kernels.hrpo_gate_decode import hrpo_gate_decode
from fastlatent_kernels.hrpo_gate_decode.operators import register
from fastlatent_kernels.triton_support import softplus, why_not_triton


@triton.jit
def _kernel(token_ids_ptr, mixture_ptr, table_ptr, weight_ptr, bias_ptr, lambda_ptr, latent_ptr, out_ptr, B, V, D,
            compat_eps, SCALE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr):
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    is_column, is_row = column < D, row < B
    token_id = tl.load(token_ids_ptr + row, mask=is_row, other=0)
    is_known = (token_id >= 0) & (token_id < V)
    latent = tl.load(latent_ptr + row, mask=is_row, other=0) != 0
    token_row = table_ptr + tl.where(is_known, token_id, 0) * D

    # rows that all read plain tokens need no product
    depth = tl.where(tl.max(latent.to(tl.int32), axis=0) > 0, D, 0)
    u_r = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    u_i = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for begin in range(0, depth, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        x = tl.load(token_row[:, None] + k[None, :], mask=latent[:, None] & (k < D)[None, :], other=0.0)
        at_r = column.to(tl.int64)[None, :] * D + k[:, None]
        at_i = (column.to(tl.int64) + D)[None, :] * D + k[:, None]
        inside = is_column[None, :] & (k < D)[:, None]
        w_r = tl.load(weight_ptr + at_r, mask=inside, other=0.0).to(x.dtype)
        w_i = tl.load(weight_ptr + at_i, mask=inside, other=0.0).to(x.dtype)
        u_r = tl.dot(x, w_r, u_r, input_precision="ieee")
        u_i = tl.dot(x, w_i, u_i, input_precision="ieee")

    inside = is_row[:, None] & is_column[None, :]
    at = row.to(tl.int64)[:, None] * D + column[None, :]
    token = tl.load(token_row[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    token = tl.where(is_known[:, None], token, float("nan"))
    mixture = tl.load(mixture_ptr + at, mask=inside & latent[:, None], other=0.0).to(tl.float32)
    bias_r = tl.load(bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    bias_i = tl.load(bias_ptr + D + column, mask=is_column, other=0.0).to(tl.float32)
    lamb = tl.load(lambda_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    log_scale = -SCALE * softplus(-lamb)
    out = gated(u_r + bias_r[None, :], u_i + bias_i[None, :], token, mixture, log_scale[None, :], compat_eps)
    tl.store(out_ptr + at, tl.where(latent[:, None], out, token).to(out_ptr.dtype.element_ty), mask=inside)


def _fill(token_ids_B, mixture_BD, table_VD, weight_2DD, bias_2D, lambda_D, latent_B, out_BD, compat_eps) -> None:
    (B, D), V = out_BD.shape, table_VD.shape[0]
    inputs = (tensor.contiguous() for tensor in (
        token_ids_B, mixture_BD, table_VD, weight_2DD, bias_2D, lambda_D, latent_B))
    BLOCK_B = min(64, max(16, triton.next_power_of_2(B)))
    # 16 columns a program: D = 1536 makes 96 programs, enough requests in flight to read the weights at full bandwidth
    BLOCK_D, BLOCK_K = 16, 128 if table_VD.dtype != torch.float32 else 32
    _kernel[triton.cdiv(D, BLOCK_D), triton.cdiv(B, BLOCK_B)](
        *inputs, out_BD, B, V, D, compat_eps, SCALE=DECAY_SCALE, BLOCK_B=BLOCK_B, BLOCK_D=BLOCK_D, BLOCK_K=BLOCK_K,
        num_warps=4, num_stages=4)


_decode = register("triton", ("CPU", "CUDA"), _fill)


def _supports(token_ids_B, mixture_BD, table_VD, weight_2DD, bias_2D, lambda_D, latent_B, out_BD, compat_eps=0.0):
    return why_not_triton(token_ids_B, mixture_BD, table_VD, weight_2DD, bias_2D, lambda_D, latent_B, out_BD)


@hrpo_gate_decode.backend("triton", supports=_supports)
@torch.no_grad()
def _run(token_ids_B, mixture_BD, table_VD, weight_2DD, bias_2D, lambda_D, latent_B, out_BD, compat_eps=0.0):
    _decode(token_ids_B, mixture_BD, table_VD, weight_2DD, bias_2D, lambda_D, latent_B, out_BD, compat_eps)
    return out_BD


_TYPES = {"token_ids_ptr": "*i64", "mixture_ptr": "*bf16", "table_ptr": "*bf16", "weight_ptr": "*bf16",
          "bias_ptr": "*fp32", "lambda_ptr": "*fp32", "latent_ptr": "*i1", "out_ptr": "*bf16", "B": "i32", "V": "i32",
          "D": "i32", "compat_eps": "fp32"}

AOT = tuple(
    Compile(_kernel, _TYPES, {"SCALE": DECAY_SCALE, "BLOCK_B": rows, "BLOCK_D": 16, "BLOCK_K": 128}, num_stages=4,
            label=f"{rows} rows", requires=("LDGSTS.E",))
    for rows in (16, 64))
