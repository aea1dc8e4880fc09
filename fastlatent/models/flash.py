"""flash-attn as the attention of packed batches: which version there is, whether it can run here, and its call.

Version 2 (`flash_attn`) is taken before version 4 (`flash_attn.cute`); both are called by the documented
`flash_attn_varlen_func(q, k, v, cu_seqlens_q=, cu_seqlens_k=, max_seqlen_q=, max_seqlen_k=, softmax_scale=, causal=True)`.

Shared prompts need no mask. A completion's keys are its prompt's and then its own, gathered; flash-attn aligns the causal
triangle of a segment with more keys than queries to the bottom right, so that its query i sees the keys up to prefix + i: the
whole prompt, and of its own tokens those up to itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor
from transformers import PretrainedConfig

from fastlatent.errors import UserError
from fastlatent.models import head_size
from fastlatent.types import Varlen

MODULES = {"flash_attn": "flash-attn 2", "flash_attn.cute": "flash-attn 4"}
"""What to import, first choice first, and what it is called."""

MAX_HEAD = 256


@dataclass(frozen=True, slots=True)
class Flash:
    name: str  # with its version
    function: Callable[..., Tensor | tuple[Tensor, ...]]

    def attend(self, where: Varlen, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """[1, heads, T, head] each, keys and values with as many heads or fewer -> [1, T, heads, head], differentiable."""
        # of one dtype: a norm of query and key with float32 weights leaves them in float32, and autocast knows only torch's own
        query_T, key_T, value_T = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
        cu_seqlens_k, max_seqlen_k = where.cu_seqlens, where.max_seqlen
        if where.key_K is not None:
            key_T, value_T = key_T[where.key_K], value_T[where.key_K]
            cu_seqlens_k, max_seqlen_k = where.cu_seqlens_k, where.max_seqlen_k
        out = self.function(
            query_T, key_T, value_T, cu_seqlens_q=where.cu_seqlens, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=where.max_seqlen,
            max_seqlen_k=max_seqlen_k, softmax_scale=scaling, causal=True)
        out_T = out[0] if isinstance(out, tuple) else out  # version 4 may return the row sums, too
        return out_T[None]


def installed() -> Flash | None:
    """The version to use; None where there is none. An import that fails for any other reason than absence is an error."""
    for module, name in MODULES.items():
        try:
            found = import_module(module)
        except ModuleNotFoundError as error:
            if error.name not in MODULES:
                raise
            continue
        if hasattr(found, "flash_attn_varlen_func"):  # without version 2, `flash_attn` is an empty folder around version 4
            version = getattr(found, "__version__", None)
            return Flash(f"flash-attn {version}" if version else name, found.flash_attn_varlen_func)
    return None


def refusal(device: torch.device, dtype: torch.dtype, config: PretrainedConfig) -> str | None:
    """Why flash-attn cannot run a model of this architecture here; None where it can, if it is installed."""
    if device.type != "cuda":
        return f"needs a GPU, and this run is on the {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs model.dtype=bfloat16, and this run computes in {str(dtype).removeprefix('torch.')}"
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"needs compute capability 8.0, and this GPU has {'.'.join(map(str, capability))}"
    head = head_size(config)
    return f"has heads of at most {MAX_HEAD}, and this model's are {head}" if head > MAX_HEAD else None


def choose(wanted: str, device: torch.device, dtype: torch.dtype, config: PretrainedConfig) -> Flash | None:
    """flash-attn where `model.attention` is `flash`, or `auto` and it can run; None: torch's own attention.

    UserError where it was asked for by name and cannot run.
    """
    if wanted == "sdpa":
        return None
    reason, found = refusal(device, dtype, config), None
    if reason is None and (found := installed()) is None:
        reason = "is not installed; pip install flash-attn --no-build-isolation, or flash-attn-4"
    if reason is not None and wanted == "flash":
        raise UserError(f"model.attention: flash-attn {reason}; wanted model.attention=sdpa or auto")
    return found
