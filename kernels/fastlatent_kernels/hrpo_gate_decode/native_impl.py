"""hrpo_gate_decode on a CPU: torch's gather and GEMM, then hrpo_gate's C++ pass straight into the output."""

from __future__ import annotations

import torch

from fastlatent_kernels.hrpo_gate import native_impl as gate
from fastlatent_kernels.hrpo_gate_decode import gather_and_multiply, hrpo_gate_decode
from fastlatent_kernels.hrpo_gate_decode.operators import register


def _fill(token_ids_B, mixture_BD, table_VD, weight_2DD, bias_2D, lambda_D, latent_B, out_BD, compat_eps) -> None:
    token_BD, u_B2D = gather_and_multiply(token_ids_B, table_VD, weight_2DD)
    small = (tensor.contiguous() for tensor in (mixture_BD, bias_2D, lambda_D, latent_B))
    gate.forward(u_B2D, token_BD, *small, compat_eps, out_BD)


_decode = register("native", ("CPU",), _fill)


def _supports(token_ids_B, mixture_BD, table_VD, weight_2DD, bias_2D, lambda_D, latent_B, out_BD, compat_eps=0.0):
    return gate.why_not(table_VD, out_BD, mixture_BD, bias_2D, lambda_D)


@hrpo_gate_decode.backend("native", supports=_supports)
@torch.no_grad()
def _run(token_ids_B, mixture_BD, table_VD, weight_2DD, bias_2D, lambda_D, latent_B, out_BD, compat_eps=0.0):
    _decode(token_ids_B, mixture_BD, table_VD, weight_2DD, bias_2D, lambda_D, latent_B, out_BD, compat_eps)
    return out_BD
