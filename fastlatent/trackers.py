"""Where metrics go besides the run folder: TensorBoard, or any class of the user's.

A tracker is a class made without arguments that has `log(metrics, step)` and `close()`; name it by its dotted path.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from fastlatent.errors import UserError
from fastlatent.registry import import_own

WANTED = "a class with log(metrics, step) and close()"


class Tracker(Protocol):
    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """The trackers of a run, addressed as one; they begin with `start`, when the run folder is there."""

    def __init__(self, makers: Sequence[Callable[[Path], Tracker]]):
        self._makers, self._open = makers, []

    def start(self, folder: Path) -> None:
        self._open = [make(Path(folder)) for make in self._makers]

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for tracker in self._open:
            tracker.log(metrics, step)

    def close(self) -> None:
        for tracker in self._open:
            tracker.close()
        self._open = []


def open_trackers(names: Sequence[str]) -> Trackers:
    """Find every tracker, before anything expensive happens; UserError for one that cannot be had."""
    return Trackers([_maker(name, f"log.trackers.{index}") for index, name in enumerate(names)])


class TensorBoard:
    """Event files in `<run>/tensorboard`; a value that is not finite is left out."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and optional

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def _maker(name: str, where: str) -> Callable[[Path], Tracker]:
    if name == "tensorboard":
        if importlib.util.find_spec("tensorboard") is None:
            raise UserError(f"{where}: tensorboard is not installed; pip install tensorboard")
        return TensorBoard
    if "." not in name and ":" not in name:
        raise UserError(f"{where}: {name!r} is neither tensorboard nor the dotted path of {WANTED}")
    tracker = import_own(name, where)
    if missing := [method for method in ("log", "close") if not callable(getattr(tracker, method, None))]:
        raise UserError(f"{where}: {name!r} has no {missing[0]}(); wanted {WANTED}")
    return lambda folder: tracker()
