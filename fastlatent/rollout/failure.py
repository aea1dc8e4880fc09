"""An engine that fails while it is needed: one sentence with its cause, so that a run can save itself before it ends."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from traceback import format_exception

from torch import Tensor

from fastlatent.errors import Failed, UserError
from fastlatent.interrupt import Interrupted
from fastlatent.rollout.base import RolloutEngine
from fastlatent.types import Request, Rollout, Sampling


class EngineFailed(Failed):
    """What an engine raised, in one sentence; the exception itself is the `__cause__`."""


def generate(engine: RolloutEngine, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
    """`engine.generate`; EngineFailed where it raises, unless it was told to stop or says something to the user itself."""
    with _telling(f"drawing {len(requests)} completions"):
        return engine.generate(requests, sampling)


def load_weights(engine: RolloutEngine, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
    """`engine.load_weights`, in the same way."""
    with _telling(f"taking the weights of step {version}"):
        engine.load_weights(tensors, version)


@contextmanager
def released(engine: RolloutEngine) -> Iterator[None]:
    """`engine.released`, in the same way; what is raised inside is not the engine's."""
    asleep = engine.released()
    with _telling("handing its memory back"):
        asleep.__enter__()
    try:
        yield
    except BaseException:
        asleep.__exit__(*sys.exc_info())
        raise
    with _telling("taking its memory again"):
        asleep.__exit__(None, None, None)


@contextmanager
def kept_in(folder: Path) -> Iterator[None]:
    """Write the traceback of an EngineFailed to `folder / "engine-failure.txt"`, where that can be written, and say so."""
    try:
        yield
    except EngineFailed as error:
        path = folder / "engine-failure.txt"
        try:
            path.write_text("".join(format_exception(error)))
        except OSError:
            raise error from error.__cause__
        raise EngineFailed(f"{error}; its traceback is in {path}") from error


@contextmanager
def _telling(doing: str) -> Iterator[None]:
    try:
        yield
    except (Interrupted, UserError):
        raise
    except Exception as error:  # whatever an engine and all it stands on may raise
        first = str(error).strip().partition("\n")[0]
        raise EngineFailed(f"the engine failed while {doing}: {type(error).__name__}{': ' if first else ''}{first}") from error
