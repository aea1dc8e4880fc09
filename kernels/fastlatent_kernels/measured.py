"""What was measured of the backends, which the automatic choice follows: their speed in that of the reference.

`measured.json` holds a line for each op, backend, kind of device, direction (a forward pass alone, or both that and
the backward pass of a call that learns), type and number of rows; `python -m benches.kernels_choice` writes it. A call
goes by the measurement of its direction and type that is nearest in rows, as a ratio. What was never measured keeps its
place in the order of the op.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("measured.json")


class Measured:
    """One backend of one op on one kind of device ("cpu" or "cuda").

    Args:
        points: of each direction ("forward", and "both" where there is a gradient) and type ("float32" or "bfloat16",
            which stands for all of half precision) rows of a call and times the speed of the reference, by rising rows.
        machine: on which.
    """

    def __init__(self, points: dict[tuple[str, str], Sequence[tuple[int, float]]], machine: str):
        self.points, self.machine = {key: tuple(of) for key, of in points.items()}, machine
        self.is_ever_slower = any(speed < 1 for of in points.values() for _, speed in of)
        self._steps = {key: self._steps_of(of) for key, of in points.items()}

    def slower(self, num_rows: int, learns: bool, is_half: bool) -> str | None:
        """None, or the sentence that says how much slower than the reference it is for so many rows."""
        dtype = "bfloat16" if is_half else "float32"
        key = ("both", dtype) if learns and ("both", dtype) in self._steps else ("forward", dtype)
        steps = self._steps.get(key, ())
        for most_rows, sentence in steps[:-1]:
            if num_rows <= most_rows:
                return sentence
        return steps[-1][1] if steps else None

    def told(self, dtype: str) -> str:
        """What was measured with this type."""
        of_dtype = {direction: points for (direction, of), points in self.points.items() if of == dtype}
        each = "; ".join(f"{direction} {', '.join(f'{speed:.3g} at {_rows(num_rows)}' for num_rows, speed in points)}"
                         for direction, points in of_dtype.items())
        return f"times the reference's speed: {each} ({self.machine})"

    def _steps_of(self, points: Sequence[tuple[int, float]]) -> tuple[tuple[float, str | None], ...]:
        """Up to how many rows each point is the nearest, and what is to be said of it if it is slower."""
        rows = [num_rows for num_rows, _ in points]
        ends = [*((low * high) ** 0.5 for low, high in zip(rows, rows[1:], strict=False)), math.inf]
        return tuple((end, None if speed >= 1 else f"{speed:.3g} times the reference's speed, measured at "
                                                   f"{_rows(num_rows)} ({self.machine})")
                     for end, (num_rows, speed) in zip(ends, points, strict=True))


def _rows(num_rows: int) -> str:
    return f"{num_rows} row{'s' * (num_rows != 1)}"


def table(lines: Sequence[dict[str, Any]]) -> dict[str, dict[tuple[str, str], Measured]]:
    """By op, then by backend and kind of device."""
    found: dict[str, dict[tuple[str, str], dict[tuple[str, str], list[tuple[int, float]]]]] = {}
    machines = {}
    for line in sorted(lines, key=lambda line: line["rows"]):
        key = line["backend"], line["device"]
        points = found.setdefault(line["op"], {}).setdefault(key, {})
        points.setdefault((line["direction"], line["dtype"]), []).append((line["rows"], line["speed"]))
        machines[line["op"], *key] = line["machine"]
    return {op: {key: Measured(points, machines[op, *key]) for key, points in of_op.items()}
            for op, of_op in found.items()}


TABLE = table(json.loads(FILE.read_text()))
