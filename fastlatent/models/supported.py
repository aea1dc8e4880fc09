"""Which models can be trained here, asked of a model's architecture alone: a skeleton without weights will do."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from fastlatent.errors import UserError
from fastlatent.models import attention
from fastlatent.schema import ModelConfig


def check_supported(model: PreTrainedModel, config: ModelConfig) -> None:
    """UserError naming the option and the reason unless `model` can be trained as `config` says."""
    _check_head(model)
    attention.check(model, "model.path")
    if config.lora is not None:
        _check_targets(model, config.lora.target_modules)


def _check_targets(model: PreTrainedModel, targets: list[str]) -> None:
    """Each target names a linear layer: an adapter library takes a name nothing answers to in silence."""
    linear = [name for name, module in model.model.named_modules(prefix="model") if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in linear):
            leaves = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            raise UserError(f"model.lora.target_modules: {type(model).__name__} has no linear layer {target!r}; it has "
                            f"{leaves}")


def _check_head(model) -> None:
    """Refuse heads whose logits are not hidden @ W.T: the fused ops would be silently wrong."""
    head, config = getattr(model, "lm_head", None), model.config
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise UserError(f"model.path: {type(model).__name__} is not supported: wanted a head that is one linear layer "
                        "without bias")
    for option in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, option, None) not in (None, 1, 1.0):
            raise UserError(f"model.path: {type(model).__name__} is not supported: it sets {option}")
    if not isinstance(getattr(model, "model", None), nn.Module):
        raise UserError(f"model.path: {type(model).__name__} is not supported: wanted its blocks in a module called 'model'")
    if getattr(model.model, "embed_scale", None) or getattr(config, "embedding_multiplier", None) not in (None, 1, 1.0):
        raise UserError(f"model.path: {type(model).__name__} is not supported: it scales its input embeddings")
