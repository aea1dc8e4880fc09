"""An engine that fails while it draws: one sentence with its cause, so that the run can save itself before it ends."""

from __future__ import annotations

from collections.abc import Sequence

from fastlatent.errors import UserError
from fastlatent.interrupt import Interrupted
from fastlatent.rollout.base import RolloutEngine
from fastlatent.types import Request, Rollout, Sampling


class EngineFailed(Exception):
    """What an engine raised, in one sentence; the exception itself is the `__cause__`."""


def generate(engine: RolloutEngine, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
    """`engine.generate`; EngineFailed where it raises, unless it was told to stop or says something to the user itself."""
    try:
        return engine.generate(requests, sampling)
    except (Interrupted, UserError):
        raise
    except Exception as error:  # whatever an engine and all it stands on may raise
        first = str(error).strip().partition("\n")[0]
        raise EngineFailed(f"the engine failed while drawing {len(requests)} completions: {type(error).__name__}"
                           f"{': ' if first else ''}{first}") from error
