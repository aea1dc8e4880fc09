"""The engine of a run that names none: vllm where it can run this model here, else hf. A named engine is never exchanged.

`fastlatent.engine_choice` asks once, when a run starts, and puts the engine it chose into the run's configuration.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from fastlatent.rollout.base import ENGINES, EngineConfig
from fastlatent.rollout.hf_engine import HFEngine
from fastlatent.rollout.vllm_engine import VLLMEngine
from fastlatent.vllm_plugin import surface


@ENGINES.register("auto")
class AutoEngine:
    """Stands for the engine until it is chosen; draws nothing itself."""

    capabilities = HFEngine.capabilities & VLLMEngine.capabilities

    @dataclass(kw_only=True)
    class Config(EngineConfig):
        name: str = "auto"
        max_batch: int = 64
        """Most completions decoded at once. The other options of an engine are for runs that name it."""

        def __post_init__(self):
            HFEngine.Config(max_batch=self.max_batch)  # the same bounds

    @classmethod
    def choose(cls, config: Config, model: PretrainedConfig, device: torch.device) -> tuple[EngineConfig, str]:
        """The configuration of the engine to use, and the reason."""
        vllm = VLLMEngine.Config(max_batch=config.max_batch)
        if refusal := VLLMEngine.refusal(vllm, model, device):
            return HFEngine.Config(max_batch=config.max_batch), refusal
        return vllm, f"{' '.join(surface.installed())} runs {model.model_type} models on {device.type}"
