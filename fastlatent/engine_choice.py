"""Which engine a run with engine.name=auto draws with. Chosen when it starts and kept in its configuration: a run goes on, and
is evaluated, with the engine it was started with, whatever has been installed since."""

from __future__ import annotations

from dataclasses import replace

from fastlatent import build, models
from fastlatent.config import from_dict, to_dict
from fastlatent.rollout.auto import AutoEngine
from fastlatent.rollout.base import EngineConfig
from fastlatent.runfolder import RunFolder
from fastlatent.schema import Config


def settled(config: Config) -> tuple[Config, str | None]:
    """The configuration with an engine that draws, and the sentence that says why it is this one; None where it was named."""
    if config.engine.name != "auto":
        return config, None
    engine, reason = _resumed(config) if config.resume else _chosen(config)
    return replace(config, engine=engine), f"engine.name=auto: {engine.name}: {reason}"


def _resumed(config: Config) -> tuple[EngineConfig, str]:
    tree = to_dict(config)
    engine = from_dict(tree | {"engine": RunFolder.engine_to_resume(tree)}).engine
    return engine, "the run was started with it"


def _chosen(config: Config) -> tuple[EngineConfig, str]:
    model = models.skeleton(models.resolve_model(config.model.path), config.model.trust_remote_code)
    return AutoEngine.choose(config.engine, model.config, build.device_of(config))
