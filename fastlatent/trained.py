"""A finished (or interrupted) run, opened for use: its configuration, its trained policy, an engine that decodes as it
trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastlatent import build, checkpoint, manifest
from fastlatent.config import load_config
from fastlatent.engine_choice import settled
from fastlatent.errors import UserError
from fastlatent.models.files import TOKENIZER
from fastlatent.policy import Policy
from fastlatent.rollout.base import RolloutEngine
from fastlatent.rollout.failure import load_weights
from fastlatent.schema import Config


@dataclass(slots=True)
class Trained:
    config: Config
    policy: Policy
    tokenizer: object
    path: Path  # of the checkpoint
    step: int

    def engine(self) -> RolloutEngine:
        """An engine with these weights, loaded as version `step`."""
        engine = build.engine(self.config, self.policy, self.tokenizer)
        load_weights(engine, self.policy.published(), self.step)
        return engine


def add_arguments(parser) -> None:
    """The arguments every command on a run shares."""
    parser.add_argument("run", metavar="RUN", help="run folder, as printed by training")
    parser.add_argument("--checkpoint", default="best", metavar="WHICH",
                        help="best (by held-out accuracy, where it was measured), last, or a step number (default: best)")
    parser.add_argument("--device", default=None, help="auto, cpu or cuda (default: as trained)")


def add_engine(parser) -> None:
    """The argument of commands that draw: a run may be opened where its engine is not installed."""
    parser.add_argument("--engine", default=None, metavar="NAME", help="hf or vllm (default: as trained)")


def check_samples(num_samples: int) -> None:
    """UserError for a `--samples` that cannot be: step and sample share 32 bits of the noise counter."""
    if not 0 <= num_samples <= 2**16:
        raise UserError(f"--samples: wanted 0 to {2**16}, got {num_samples}")


def run_config(folder: str, device: str | None = None, engine: str | None = None) -> Config:
    """The configuration of a run as it is used here: where nothing is learnt, on this device, by this engine."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: is no run folder: it has no config.yaml")
    try:
        load_config(path)
    except UserError as error:  # of the file, as another version may have written it: nobody typed these options here
        raise UserError(f"{'' if str(error).startswith(str(path)) else f'{path}: '}{error}") from None
    # what only makes the update faster may not run here, where nothing is learnt
    overrides = ["model.attention=auto", "model.liger=false", "model.compile=false"]
    chosen = {"model.device": device, "engine.name": engine}
    overrides += [f"{key}={value}" for key, value in chosen.items() if value]
    return settled(load_config(path, overrides=overrides))[0]


def open_run(folder: str, which: str = "best", device: str | None = None, engine: str | None = None) -> Trained:
    """Load a run's checkpoint into a policy of its configuration."""
    config = run_config(folder, device, engine)
    _check_model(Path(folder), config)
    stored = checkpoint.load(_choose(Path(folder), which))
    policy = build.policy(config)
    policy.restore(stored)
    policy.eval()
    return Trained(config, policy, build.tokenizer(config), stored.path, stored.step)


def _check_model(folder: Path, config: Config) -> None:
    """UserError where the checkpoints of the run are of another model or tokenizer: of its weights only where some are not in
    them."""
    if (folder / "manifest.json").is_file():
        is_whole = config.model.lora is None and not config.model.freeze_embedding
        manifest.check_model(folder, build.model_files(config), ["config.json", *TOKENIZER] if is_whole else None)


def _choose(folder: Path, which: str) -> Path:
    found = checkpoint.find(folder)
    if not found:
        raise UserError(f"{folder}: has no finished checkpoint")
    if which == "last":
        return next(reversed(found.values()))
    if which == "best":
        newest = checkpoint.load(next(reversed(found.values())))
        return found.get(newest.state["best_step"], newest.path)
    if not which.isdecimal() or int(which) not in found:
        raise UserError(f"--checkpoint: {which!r} is not best, last or one of the steps {', '.join(map(str, found))}")
    return found[int(which)]
