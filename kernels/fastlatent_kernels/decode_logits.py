"""The logits of a decode step, where a head needs all of them: `head_logits`, or what multiplies a few rows faster."""

from __future__ import annotations

from torch import Tensor

from fastlatent_kernels.dispatch import allows
from fastlatent_kernels.token_logprob import head_logits

try:
    from fastlatent_kernels.vocab_head import native_bf16
except ModuleNotFoundError as error:  # built without native kernels
    if error.name != "fastlatent_kernels._C":
        raise
    native_bf16 = None


def decode_logits(hidden_BD: Tensor, weight_VD: Tensor) -> Tensor:
    """hidden @ weight.T [B, V] in float32 (float64 for float64), without gradient.

    On a CPU with AVX512_BF16 those of bfloat16 are float32 sums, and a row gives the same bits in any company; elsewhere on a
    CPU, or where a backend other than native was forced, they come rounded to bfloat16.
    """
    if native_bf16 is not None and allows("native") and hidden_BD.is_cpu and native_bf16.takes(hidden_BD, weight_VD, None):
        return native_bf16.logits(hidden_BD, weight_VD)
    return head_logits(hidden_BD, weight_VD)
