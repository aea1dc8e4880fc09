"""Non-finite steps: skipped by the optimizer, counted here, written down for reproduction, and fatal when they do not stop.
Non-finite weights are fatal at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from fastlatent.errors import Failed
from fastlatent.types import Batch, LatentActions, Rollout, Varlen
from fastlatent.update import UpdateResult


class TrainingDiverged(Failed):
    """`max_bad_steps` steps in a row were non-finite, or the weights are."""


class Guard:
    def __init__(self, folder: Path, max_bad_steps: int):
        self.folder, self.max_bad_steps = folder, max_bad_steps
        self.num_skipped = self.num_in_a_row = 0
        self.path: Path | None = None  # of the last reproduction file

    def check_drawn(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """Raise TrainingDiverged where weights that are not finite drew these. The loss would not tell: their completions are
        all alike, so are the rewards, and nothing is learnt from them."""
        if not all(math.isfinite(e) for r in rollouts for e, is_action in zip(r.entropy, r.acted, strict=True) if is_action):
            raise TrainingDiverged(f"the weights of step {step} are not finite, or give probabilities that are not; a lower "
                                   "optim.lr is the first thing to try")

    def count(self, step: int, result: UpdateResult, metrics: dict[str, float]) -> None:
        """Count a skipped step and write down what its first skipped optimizer step learnt from."""
        bad = next((a for a in result.attempts if bool(a.is_bad)), None)
        self.num_in_a_row = self.num_in_a_row + 1 if bad else 0
        self.num_skipped += bad is not None
        metrics["guard/skipped_steps"] = float(self.num_skipped)
        if bad:
            self.path = self.folder / f"bad-step-{step:06d}.safetensors"
            save_file(_tensors(bad.batches), self.path, {"step": str(step), "loss": str(float(result.loss)),
                                                         "grad_norm": str(float(result.grad_norm))})

    def check(self) -> None:
        """Raise TrainingDiverged at the limit."""
        if self.num_in_a_row >= self.max_bad_steps:
            raise TrainingDiverged(
                f"{self.num_in_a_row} steps in a row had a non-finite loss or gradient; the last one's batch is {self.path}")

    def state(self) -> dict[str, int]:
        return {"num_skipped": self.num_skipped, "num_in_a_row": self.num_in_a_row}

    def load(self, state: dict[str, int]) -> None:
        self.num_skipped, self.num_in_a_row = state["num_skipped"], state["num_in_a_row"]


def _tensors(batches: list[Batch]) -> dict[str, Tensor]:
    """Everything `policy.score` and the loss read, by microbatch; a record's columns and the layout under their names."""
    out = {}
    for index, batch in enumerate(batches):
        out |= {f"{index}.{name}": value for name, value in _fields(batch)}
        out |= {f"{index}.varlen.{name}": value for name, value in _fields(batch.varlen)}
        out |= {f"{index}.record.{name}": value for name, value in (batch.record_T or {}).items()}
        if batch.actions is not None:
            out |= {f"{index}.actions.{name}": value for name, value in _fields(batch.actions)}
            out |= {f"{index}.actions.record.{name}": value for name, value in batch.actions.record_N.items()}
    return {name: value.detach().cpu().contiguous() for name, value in out.items()}


def _fields(value: Batch | Varlen | LatentActions) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name in value.__slots__ if isinstance(tensor := getattr(value, name), Tensor)]
