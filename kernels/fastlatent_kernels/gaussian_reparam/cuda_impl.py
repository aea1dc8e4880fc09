"""gaussian_reparam in CUDA, on sm_80 and later (csrc/cuda/gaussian_reparam.cu). Compiled, never run."""

from __future__ import annotations

import torch

import fastlatent_kernels._cuda as _cuda
from fastlatent_kernels.cuda_support import never_run, why_not_cuda
from fastlatent_kernels.gaussian_reparam import gaussian_reparam
from fastlatent_kernels.gaussian_reparam.operators import register
from fastlatent_kernels.structs import fill

DTYPES = (torch.float32, torch.bfloat16)


def _launch(kernel, arguments, inputs, **fields) -> None:
    mean_TD = inputs.mean_TD
    fields |= {"mean": mean_TD, "logvar": inputs.logvar_TD, "given": inputs.given_TD, "seed": inputs.seed,
               "counter": inputs.counter_T3, "is_bf16": mean_TD.dtype == torch.bfloat16,
               "source": getattr(_cuda.Source, inputs.source), "rows": mean_TD.shape[0], "width": mean_TD.shape[1],
               "free_bits": inputs.free_bits}
    fill(arguments, fields)
    kernel(arguments, torch.cuda.current_stream(mean_TD.device).cuda_stream, mean_TD.device.index)


def _forward(inputs, z_TD, kl_T, logprob_T, variance_T) -> None:
    _launch(_cuda.gaussian_reparam_forward, _cuda.GaussianForward(), inputs,
            z=z_TD, kl=kl_T, logprob=logprob_T, variance=variance_T)


def _backward(inputs, gradients, d_mean_TD, d_logvar_TD) -> None:
    _launch(_cuda.gaussian_reparam_backward, _cuda.GaussianBackward(), inputs,
            g_z=gradients.z_TD, g_kl=gradients.kl_T, g_logprob=gradients.logprob_T, g_variance=gradients.variance_T,
            d_mean=d_mean_TD, d_logvar=d_logvar_TD)


def _supports(mean_TD, logvar_TD, free_bits=0.0, *, seed=None, counter_T3=None, eps_TD=None, z_TD=None) -> str | None:
    if (reason := why_not_cuda(mean_TD)) is not None:
        return reason
    dtypes = {x.dtype for x in (mean_TD, logvar_TD, eps_TD, z_TD) if x is not None}
    if len(dtypes) > 1 or mean_TD.dtype not in DTYPES:
        return "cuda takes float32 or bfloat16 tensors, all of one dtype"
    return None


gaussian_reparam.backend("cuda", supports=_supports, rule=never_run)(register("cuda", "CUDA", _forward, _backward))
