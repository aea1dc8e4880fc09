"""What the backward pass of a block finds stored, and what it computes again: `model.gradient_checkpointing`.

true stores a block's input alone. selective also stores what its matrix products and attention gave, so that only what is
cheap is computed again: norms, rotary embeddings, activations, gathers and casts. Attention that torch does not see as an
operator of its own (a kernel called from an autograd function) is computed again, too.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

STORED = {getattr(torch.ops.aten, name).default for name in (
    "mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu")}
FLASH = "flash_attn."  # operators of flash-attn 2


def enable(model, how: bool | str) -> None:
    """Checkpoint each block of a transformers model; `how` is true or `selective`."""
    options = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _policy(_, operator, *args, **kwargs) -> CheckpointPolicy:
    is_stored = operator in STORED or str(operator).startswith(FLASH)
    return CheckpointPolicy.MUST_SAVE if is_stored else CheckpointPolicy.PREFER_RECOMPUTE
