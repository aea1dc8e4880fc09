"""Append-only logs of a run: JSON lines that each carry their step, whole after any interruption."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from fastlatent.errors import UserError
from fastlatent.metrics import check


class StepLog:
    """A file of JSON objects, one per line, in the order they were written.

    A float comes back bit for bit (its shortest repr is what is written); nan and infinities are written as null,
    because JSON has no word for them. A line is in the kernel's hands when `append` returns: killing the process does
    not lose it.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._cut(self.path.read_bytes() if self.path.exists() else b"")
        self._file = open(self.path, "ab", buffering=0)  # a buffer would try again, and fail again, when it is closed

    def append(self, *rows: dict) -> None:
        """Write rows, each with its `step`, in one go: all of them, or none and OSError."""
        start, content = self.position(), memoryview(b"".join(json_line(row) for row in rows))
        try:
            while content:  # a full disk takes a part
                content = content[self._file.write(content):]
        except OSError:
            self.truncate(start)
            raise

    def position(self) -> int:
        """Where the log ends now, for a checkpoint to remember."""
        return self._file.tell()

    def truncate(self, position: int) -> None:
        """Forget what was written after `position`: a resumed run writes those lines again."""
        self._file.truncate(min(position, self.position()))
        self._file.seek(0, os.SEEK_END)

    def sync(self) -> None:
        """Wait until the lines so far would survive a power failure."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _cut(self, content: bytes) -> None:
        """Drop a last line that a killed process left unfinished."""
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)


class MetricsLog(StepLog):
    """metrics.jsonl: a line per training step and one per evaluation, every name of it in `metrics.NAMES`."""

    def __init__(self, folder: Path):
        super().__init__(Path(folder) / "metrics.jsonl")

    def append(self, *rows: dict[str, float]) -> None:
        for name in (name for row in rows for name in row):
            check(name)
        super().append(*rows)


def read(path: Path) -> list[dict]:
    """The rows of a log, without a last line that is not finished; empty where there is no log. UserError where it was
    damaged."""
    if not Path(path).exists():
        return []
    content = Path(path).read_bytes()
    lines = content[: content.rfind(b"\n") + 1].split(b"\n")
    return [_row(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line]


def _row(line: bytes, source: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or "step" not in row:
        raise UserError(f"{source}: not a line of a run's log")
    return row


def json_line(row: dict) -> bytes:
    """A row as a line of the file, nan and infinities as null."""
    return json.dumps(_finite(row), allow_nan=False, ensure_ascii=False).encode() + b"\n"


def _finite(value):
    """The value with None for every float that JSON cannot write."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
