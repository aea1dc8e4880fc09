"""hrpo_gate on a CPU: one pass over the rows in C++ forward, one backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

import fastlatent_kernels._C as _C
from fastlatent_kernels.hrpo_gate import DECAY_SCALE, hrpo_gate
from fastlatent_kernels.hrpo_gate.operators import register
from fastlatent_kernels.native import why_not_cpu
from fastlatent_kernels.structs import fill

_MOST_CHUNKS, _LEAST_CHUNK = 64, 16  # of rows that share a column sum; functions of T alone
_ELEMENTS_PER_THREAD = 1 << 14  # below that, waking a thread costs more than it saves


def forward(u_T2D, token_TD, mixture_TD, bias_2D, lambda_D, latent_T, compat_eps, out_TD, isa: str = "") -> None:
    """Fill `out_TD`; all tensors contiguous, u, token, mixture and out of one dtype, float32 or bfloat16."""
    _call(_C.hrpo_gate, _C.HrpoGate(), isa, u=u_T2D, token=token_TD, mixture=mixture_TD, bias=bias_2D.float(),
          log_scale=_log_scale(lambda_D), latent=latent_T, compat_eps=compat_eps, out=out_TD)


def _backward(grad_TD, u_T2D, token_TD, mixture_TD, bias_2D, lambda_D, latent_T, compat_eps,
              du_T2D, dtoken_TD, dmixture_TD, isa: str = "") -> Tensor:
    T, D = token_TD.shape
    chunk_rows = max(_LEAST_CHUNK, -(-T // _MOST_CHUNKS))
    partial_C3D = torch.empty(-(-T // chunk_rows), 3, D, dtype=torch.float32)
    _call(_C.hrpo_gate_backward, _C.HrpoGateBackward(), isa, u=u_T2D, token=token_TD, mixture=mixture_TD,
          bias=bias_2D.float(), log_scale=_log_scale(lambda_D), latent=latent_T, compat_eps=compat_eps, grad=grad_TD,
          du=du_T2D, dtoken=dtoken_TD, dmixture=dmixture_TD, chunk_rows=chunk_rows, partial=partial_C3D)
    sums_3D = partial_C3D.sum(0)
    sums_3D[2] *= DECAY_SCALE * torch.sigmoid(-lambda_D)  # d(-c softplus(-Lambda)) / dLambda
    return sums_3D


def _log_scale(lambda_D: Tensor) -> Tensor:
    return -DECAY_SCALE * softplus(-lambda_D)


def _call(kernel, arguments, isa: str, *, token: Tensor, **fields) -> None:
    """Fill the struct `arguments` (csrc/structs.h) and run `kernel` on it."""
    rows, width = token.shape
    threads = max(1, min(torch.get_num_threads(), token.numel() // _ELEMENTS_PER_THREAD))
    fields |= {"token": token, "is_bf16": token.dtype == torch.bfloat16, "rows": rows, "width": width,
               "threads": threads}
    fill(arguments, fields)
    kernel(arguments, isa)


_gate = register("native", ("CPU",), forward, _backward)


def why_not(u_T2D, token_TD, mixture_TD, bias_2D, lambda_D) -> str | None:
    """None where the kernel takes these tensors, else the sentence that refuses."""
    if (reason := why_not_cpu(u_T2D, token_TD, mixture_TD, bias_2D, lambda_D)) is not None:
        return reason
    if u_T2D.dtype == token_TD.dtype == mixture_TD.dtype:
        return None
    return "native takes u, token and mixture of one dtype"


def _supports(u_T2D, token_TD, mixture_TD, bias_2D, lambda_D, latent_T, compat_eps=0.0) -> str | None:
    return why_not(u_T2D, token_TD, mixture_TD, bias_2D, lambda_D)


@hrpo_gate.backend("native", supports=_supports)
def _run(u_T2D, token_TD, mixture_TD, bias_2D, lambda_D, latent_T, compat_eps=0.0):
    return _gate(u_T2D, token_TD, mixture_TD, bias_2D, lambda_D, latent_T, compat_eps)
