"""hrpo_gate_decode in CUDA for bfloat16 on sm_80 and later (csrc/cuda/hrpo_gate_decode.cu). Compiled, never run."""

from __future__ import annotations

import torch

import fastlatent_kernels._cuda as _cuda
from fastlatent_kernels.cuda_support import never_run, why_not_cuda
from fastlatent_kernels.hrpo_gate_decode import hrpo_gate_decode
from fastlatent_kernels.hrpo_gate_decode.operators import register
from fastlatent_kernels.structs import fill


def _fill(token_ids_B, mixture_BD, table_VD, weight_2DD, bias_2D, lambda_D, latent_B, out_BD, compat_eps) -> None:
    tensors = {"token_ids": token_ids_B, "mixture": mixture_BD, "table": table_VD, "weight": weight_2DD,
               "bias": bias_2D.float(), "lambda": lambda_D, "latent": latent_B, "out": out_BD}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    arguments = _cuda.HrpoGateDecode()
    fill(arguments, tensors)
    (arguments.rows, arguments.width), arguments.vocab = out_BD.shape, table_VD.shape[0]
    arguments.compat_eps = compat_eps
    device = out_BD.device
    _cuda.hrpo_gate_decode(arguments, torch.cuda.current_stream(device).cuda_stream, device.index)


_decode = register("cuda", ("CUDA",), _fill)


def _supports(token_ids_B, mixture_BD, table_VD, weight_2DD, bias_2D, lambda_D, latent_B, out_BD,
              compat_eps=0.0) -> str | None:
    if (reason := why_not_cuda(out_BD)) is not None:
        return reason
    if any(x.dtype != torch.bfloat16 for x in (table_VD, weight_2DD, out_BD)) or lambda_D.dtype != torch.float32:
        return "cuda takes a bfloat16 table, weight and output, and a float32 Lambda"
    return None if table_VD.shape[1] % 32 == 0 else "cuda takes widths that are multiples of 32"


@hrpo_gate_decode.backend("cuda", supports=_supports, rule=never_run)
@torch.no_grad()
def _run(token_ids_B, mixture_BD, table_VD, weight_2DD, bias_2D, lambda_D, latent_B, out_BD, compat_eps=0.0):
    _decode(token_ids_B, mixture_BD, table_VD, weight_2DD, bias_2D, lambda_D, latent_B, out_BD, compat_eps)
    return out_BD
