"""What was ever seen of each path that needs a GPU: the lines of `gpu_status.jsonl`, of which the README's table is made.

    {"path": ..., "state": "measured", "where": "NVIDIA H200", "when": "2026-12", "shown": ...,
     "baseline": "1x-nvidia-h200.jsonl"}

A path is `never run`, `built` (compiled, never run), `ran` (with the right result), or `measured`. Only a file of baselines of
that GPU makes the last two believable, so they name one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benches import results
from fastlatent.errors import UserError

FILE = Path(__file__).with_name("gpu_status.jsonl")
STATES = ("never run", "built", "ran", "measured")


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    path: str  # what is run, as a reader would call it
    state: str
    shown: str  # what speaks for it so far, besides
    where: str = ""
    when: str = ""  # year and month
    baseline: str | None = None  # file in benches/baselines


def read(file: Path = FILE, baselines: Path = results.BASELINES) -> list[Status]:
    """The lines; UserError where one claims what no baseline shows."""
    out = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            status = Status(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise UserError(f"{file.name}, line {number}: not a status ({error})") from None
        if reason := _refusal(status, baselines):
            raise UserError(f"{file.name}, line {number}: {reason}")
        out.append(status)
    return out


def _refusal(status: Status, baselines: Path) -> str | None:
    """Why this cannot be claimed; None where it can."""
    if status.state not in STATES:
        return f"state {status.state!r} is not one of {', '.join(STATES)}"
    if status.state == "never run":
        return "a path that was never run has no place and time" if status.where or status.when or status.baseline else None
    if not (status.where and status.when):
        return f"{status.state!r} wants where and when"
    if status.state == "built":
        return None
    if status.baseline is None or not (baselines / status.baseline).is_file():
        return f"{status.state!r} wants a file of benches/baselines, got {status.baseline!r}"
    machines = [row["hardware"] for row in results.read(baselines / status.baseline)]
    gpus = {name for hardware in machines for name in hardware["gpus"]}
    named = {f"{results.hardware_name(hardware)}.jsonl" for hardware in machines}
    if not gpus or named != {status.baseline} or not any(name in status.where for name in gpus):
        return f"{status.baseline} was not measured on {status.where}"
    return None


def table(lines: Iterable[Status]) -> str:
    """Markdown, ending in a newline."""
    rows = [("Path that needs a GPU", "State", "Where, when", "What speaks for it so far"), ("---",) * 4]
    for line in lines:
        state = "built, never run" if line.state == "built" else line.state
        rows.append((line.path, state, ", ".join(filter(None, (line.where, line.when))), line.shown))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
