"""liger-kernel's RMSNorm, SwiGLU and rotary embeddings in place of a transformers model's own, by `model.liger`.

The norms and the SwiGLU blocks of that one model are replaced. The rotary embedding is a function of the module that defines
the architecture, so from then on every model of that architecture in this process computes it with liger's kernel: the policy,
its reference and an in-process engine.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from transformers import PretrainedConfig

from fastlatent.errors import UserError

PARTS = ("rms_norm", "swiglu", "rope")


def check(config: PretrainedConfig, device: torch.device) -> None:
    """UserError unless liger-kernel has these parts for this architecture and can run them here."""
    if device.type != "cuda":
        raise UserError(f"model.liger: liger-kernel's Triton kernels need a GPU, and this run is on the {device.type}; wanted "
                        "model.liger=false")
    _patcher(config.model_type)


def apply(model) -> None:
    """Replace them in `model`, a causal LM without adapters, and its architecture's rotary embedding."""
    patch = _patcher(model.config.model_type)
    names = inspect.signature(patch).parameters
    # all else that liger would replace belongs to the head, which is ours
    patch(model=model, **{name: name in PARTS for name in names if name != "model"})


def _patcher(model_type: str) -> Callable[..., None]:
    try:
        import liger_kernel  # noqa: F401 whether there is one
    except ModuleNotFoundError:
        raise UserError("model.liger: liger-kernel is not installed; pip install liger-kernel, or model.liger=false") from None
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as PATCHERS

    patch = PATCHERS.get(model_type)
    if patch is None or not set(PARTS) <= inspect.signature(patch).parameters.keys():
        known = sorted(name for name, patch in PATCHERS.items() if set(PARTS) <= inspect.signature(patch).parameters.keys())
        raise UserError(f"model.liger: liger-kernel replaces {', '.join(PARTS)} in {', '.join(known)} models, not in "
                        f"{model_type!r}; wanted model.liger=false")
    return patch
