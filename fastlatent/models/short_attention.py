"""Attention of short segments in bfloat16 on a CPU, the query heads that share a key head as rows of one matrix.

torch's flash kernel goes forward, and gives what it gives without this file. Its backward makes five products a head so small
that setting them up takes most of the time; here they are batched over all heads, rounded where it rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MOST_KEYS = 128
"""Longer rows of keys are as fast or faster in torch's own backward (two cores with AVX512_BF16)."""


def is_faster(query: Tensor, key_SHKD: Tensor) -> bool:
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and key_SHKD.shape[2] <= MOST_KEYS


def attend(query_SHLD: Tensor, key_SHKD: Tensor, value_SHKD: Tensor, visible_SLK: Tensor | None, scaling: float) -> Tensor:
    """softmax(scaling * query @ key.T) @ value [S, H, L, D], differentiable once.

    Args:
        key_SHKD: of as many heads or fewer, each of which serves neighbours among the query's; so does `value_SHKD`.
        visible_SLK: bool, true somewhere in each row; None: each query sees the keys up to its own place.
    """
    S, H, L, D = query_SHLD.shape
    key_heads = key_SHKD.shape[1]
    if visible_SLK is None:
        visible_SLK = torch.ones(1, L, L, dtype=torch.bool, device=query_SHLD.device).tril()
    visible_S1RK = visible_SLK.repeat(1, H // key_heads, 1)[:, None]
    query_SHRD = query_SHLD.reshape(S, key_heads, -1, D)
    return _Attention.apply(query_SHRD, key_SHKD, value_SHKD, visible_S1RK, scaling).reshape(S, H, L, D)


class _Attention(torch.autograd.Function):
    """R: the queries of a key head, those of one query head after those of another."""

    @staticmethod
    def forward(ctx, query_SHRD, key_SHKD, value_SHKD, visible_S1RK, scaling):
        mask_S1RK = torch.zeros_like(visible_S1RK, dtype=query_SHRD.dtype).masked_fill_(~visible_S1RK, -torch.inf)
        out_SHRD, lse_SHR = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query_SHRD, key_SHKD, value_SHKD, attn_mask=mask_S1RK, scale=scaling)
        ctx.save_for_backward(query_SHRD, key_SHKD, value_SHKD, mask_S1RK, out_SHRD, lse_SHR)
        ctx.scaling = scaling
        return out_SHRD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_SHRD):
        query_SHRD, key_SHKD, value_SHKD, mask_S1RK, out_SHRD, lse_SHR = ctx.saved_tensors
        # batched products of what is strided otherwise are slow
        query_SHRD, key_SHKD, value_SHKD, grad_SHRD = (
            x.contiguous() for x in (query_SHRD, key_SHKD, value_SHKD, grad_SHRD))
        dtype, wide_grad_SHRD = grad_SHRD.dtype, grad_SHRD.float()
        # float32: probabilities and their slopes are differences of larger numbers. Compiled, a backward is traced under the
        # autocast of its forward
        with torch.autocast("cpu", enabled=False):
            p_SHRK = (query_SHRD.float() * ctx.scaling) @ key_SHKD.float().mT
            p_SHRK = p_SHRK.add_(mask_S1RK).sub_(lse_SHR[..., None]).exp_()
            slope_SHRK = wide_grad_SHRD @ value_SHKD.float().mT
            slope_SHRK.sub_((wide_grad_SHRD * out_SHRD).sum(-1, keepdim=True)).mul_(p_SHRK).mul_(ctx.scaling)
        p_SHRK, slope_SHRK = p_SHRK.to(dtype), slope_SHRK.to(dtype)
        return slope_SHRK @ key_SHKD, slope_SHRK.mT @ query_SHRD, p_SHRK.mT @ grad_SHRD, None, None
