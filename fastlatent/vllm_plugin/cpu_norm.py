"""RMSNorm on a CPU by vLLM's own C++ kernels, which vLLM reserves for GPUs: offered as one more provider of its two operators.

Without a compiler of graphs it composes the norm of torch's operators there: 121 us for 64 rows of 576 in bfloat16, where its
kernel takes 16, and rounds less. Its SiLU kernel is slower than torch's (314 us beside 123) and is left alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

PROVIDER = "fastlatent_cpu"
PRIORITY = {"rms_norm": [PROVIDER], "fused_add_rms_norm": [PROVIDER]}
"""What vLLM's option `ir_op_priority` has to be for it; vLLM's own follow where the provider does not take the arguments."""


def register() -> None:
    """Add the provider to vLLM's registry, once in a process."""
    from vllm import ir

    if PROVIDER in ir.ops.rms_norm.impls:
        return
    import vllm._C  # noqa: F401  the kernels

    ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_takes)(rms_norm)
    ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_takes_residual, inplace=True)(fused_add_rms_norm)


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    out = torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, weight, epsilon)
    return out


def fused_add_rms_norm(
        x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


def _takes(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return (variance_size is None and weight is not None and weight.dtype == x.dtype and x.ndim == 2 and x.is_contiguous()
            and x.is_cpu)


def _takes_residual(x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float,
                    variance_size: int | None = None) -> bool:
    return _takes(x, weight, epsilon, variance_size) and x_residual.is_contiguous()
