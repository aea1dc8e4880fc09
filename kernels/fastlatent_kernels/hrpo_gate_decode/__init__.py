"""The gate of HRPO at a decode step: from drawn token ids and mixtures to the next inputs, in the engine's buffer.

It is the embedding gather, the product with the two stacked gate matrices and `hrpo_gate` in one launch: at a decode
step each of them alone is shorter than the launch that starts it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from fastlatent_kernels.check import FLOATS, can_look, expect, expect_number
from fastlatent_kernels.dispatch import op
from fastlatent_kernels.hrpo_gate import hrpo_gate


def _check(token_ids_B, mixture_BD, table_VD, weight_2DD, bias_2D, lambda_D, latent_B, out_BD, compat_eps=0.0) -> None:
    expect("table_VD", table_VD, ("V", "D"))
    expect("token_ids_B", token_ids_B, ("B",), (torch.int64,), like=table_VD)
    B, D = token_ids_B.shape[0], table_VD.shape[1]
    expect("mixture_BD", mixture_BD, (B, D), (table_VD.dtype,), like=table_VD)
    expect("weight_2DD", weight_2DD, (2 * D, D), like=table_VD)
    expect("bias_2D", bias_2D, (2 * D,), like=table_VD)
    expect("lambda_D", lambda_D, (D,), FLOATS[:2], like=table_VD)
    expect("latent_B", latent_B, (B,), (torch.bool,), like=table_VD)
    expect("out_BD", out_BD, (B, D), like=table_VD)
    if not out_BD.is_contiguous():
        raise ValueError(f"out_BD: expected a contiguous tensor, got strides {list(out_BD.stride())}")
    expect_number("compat_eps", compat_eps, "a number >= 0", compat_eps >= 0)


@op(backends=("triton", "native", "cuda"), check=_check)
@torch.no_grad()
def hrpo_gate_decode(token_ids_B: Tensor, mixture_BD: Tensor, table_VD: Tensor, weight_2DD: Tensor, bias_2D: Tensor,
                     lambda_D: Tensor, latent_B: Tensor, out_BD: Tensor, compat_eps: float = 0.0) -> Tensor:
    """Write `hrpo_gate` of the embeddings of `token_ids_B` into `out_BD`, without gradient.

    Args:
        token_ids_B: int64, rows of the table; any other id is a ValueError on a CPU; on a GPU, where nothing can be raised,
            its row is NaN.
        mixture_BD: in the dtype of the table, which is that of the product.
        weight_2DD: the two gate matrices, one over the other; rounded to the dtype of the table.
        lambda_D, latent_B, compat_eps: see `hrpo_gate`.
        out_BD: contiguous, any floating dtype, and apart from the other tensors.

    Returns:
        `out_BD` itself.
    """
    token_BD, u_B2D = gather_and_multiply(token_ids_B, table_VD, weight_2DD)
    return out_BD.copy_(hrpo_gate.reference(u_B2D, token_BD, mixture_BD, bias_2D, lambda_D, latent_B, compat_eps))


def gather_and_multiply(token_ids_B: Tensor, table_VD: Tensor, weight_2DD: Tensor) -> tuple[Tensor, Tensor]:
    """Token embeddings [B, D] and their product with the gate matrices [B, 2 D], in the dtype of the table."""
    try:
        token_BD = embedding(token_ids_B, table_VD) if can_look(token_ids_B) else _known_rows(token_ids_B, table_VD)
    except IndexError:
        raise ValueError(f"token_ids_B: expected ids from 0 to {table_VD.shape[0] - 1}, "
                         f"got {int(token_ids_B.min())} to {int(token_ids_B.max())}") from None
    return token_BD, linear(token_BD, weight_2DD.to(token_BD.dtype))


def _known_rows(token_ids_B: Tensor, table_VD: Tensor) -> Tensor:
    """Rows of the table, NaN for an id of none, which would take the process down with it on a GPU."""
    known_B = token_ids_B.clamp(0, table_VD.shape[0] - 1)
    return torch.where((known_B == token_ids_B)[:, None], embedding(known_B, table_VD), torch.nan)
