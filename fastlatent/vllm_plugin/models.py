"""vLLM's own model classes, one subclass a family: the head is left to the engine, which draws tokens by the noise contract. On
a CPU their layers are run by `cpu_forward`."""

from __future__ import annotations

import importlib

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""Hugging Face model type, which is also the name of vLLM's module -> vLLM's class."""

PREFIX = "Fastlatent"
"""In front of the name of each class of ours."""


def compute_logits(self, hidden_states):
    """The hidden states themselves: what vLLM takes for logits reaches our draw untouched."""
    return hidden_states


def get_model_state_cls():
    from fastlatent.vllm_plugin.state_v2 import LatentModelState

    return LatentModelState


def register_models() -> None:
    from vllm import ModelRegistry
    from vllm.platforms import current_platform

    for family, name in FAMILIES.items():
        base = getattr(importlib.import_module(f"vllm.model_executor.models.{family}"), name)
        members = {"compute_logits": compute_logits, "get_model_state_cls": staticmethod(get_model_state_cls),
                   "__module__": __name__}
        if current_platform.is_cpu():
            from fastlatent.vllm_plugin.cpu_forward import forward_of

            members["forward"] = forward_of(base)
        ours = type(PREFIX + name, (base,), members)
        globals()[PREFIX + name] = ours  # where its module says it is
        ModelRegistry.register_model(PREFIX + name, ours)
