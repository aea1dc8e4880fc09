"""What a rollout engine is, and how every engine turns its buffers into Rollouts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig

from fastlatent.errors import UserError
from fastlatent.methods.base import Method
from fastlatent.registry import Family
from fastlatent.rollout.thinking import ThinkingSpan
from fastlatent.types import Capability, Request, Rollout, Sampling

ENGINES = Family("fastlatent.rollout", "engine")


@dataclass(kw_only=True)
class EngineConfig:
    name: str = "hf"
    """Which engine: a member of fastlatent.rollout or a dotted path."""


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine is made from. Its weights are its own and arrive with the first `load_weights`."""

    model: PretrainedConfig  # the architecture
    dtype: torch.dtype  # of its weights and activations
    device: torch.device
    method: Callable[[Callable[[Tensor], Tensor]], Method]  # a new instance, given the embedding of the engine's own model
    span: ThinkingSpan
    seed: int  # of every random number
    max_prompt_tokens: int
    max_new_tokens: int


class RolloutEngine(Protocol):
    """Draws completions. It knows no method by name: it calls record_spec, start, draw, decide and embed of whatever it was
    given."""

    capabilities: frozenset[Capability]
    method: Method  # the engine's own instance; its weights arrive through load_weights under `method.`
    version: int  # of the weights it has; -1 before the first

    @classmethod
    def check(cls, config: EngineConfig, model: PretrainedConfig, device: torch.device) -> None:
        """UserError where this engine cannot run such a model here; called before any weights are loaded."""

    @classmethod
    def build(cls, config: EngineConfig, parts: EngineParts) -> RolloutEngine: ...

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """One rollout per request, in request order."""

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take the trainer's weights: model tensors under their Hugging Face names, the method's under `method.`."""

    def released(self) -> AbstractContextManager[None]:
        """Hand memory back while the trainer updates."""

    def close(self) -> None: ...


def match(method: type[Method], engine_name: str, capabilities: frozenset[Capability]) -> None:
    """Raise UserError unless the engine offers everything the method needs."""
    if missing := method.needs - capabilities:
        raise UserError(
            f"method {getattr(method, 'name', method.__name__)!r} needs {', '.join(sorted(c.value for c in missing))}; "
            f"engine {engine_name!r} offers {', '.join(sorted(c.value for c in capabilities))}")
