"""Results of kernels as a table to read while it grows, or as CSV."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping
from typing import Any

from benches.results import Result

COLUMNS = {
    "variant": 18, "direction": 9, "p20_us": 10, "p50_us": 10, "p80_us": 10, "gb_s": 8, "tflop_s": 8, "roofline": 8,
    "times_eager": 11, "times_compile": 13, "peak_mib": 9}
"""Columns of the table and their widths; CSV has the case before them."""


def row(result: Result) -> dict[str, Any]:
    """The numbers of one line, None where there is none."""
    metrics, facts, (low, high) = result.metrics(), result.facts, result.spread()["wall_s"]
    peak = metrics.get("peak_bytes")
    return {"op": facts["op"], "shape": size(facts["shape"]), "dtype": facts["dtype"], "variant": result.variant,
            "direction": facts["direction"], "p20_us": 1e6 * low, "p50_us": 1e6 * metrics["wall_s"],
            "p80_us": 1e6 * high, "gb_s": facts["gb_s"], "tflop_s": facts["tflop_s"],
            "roofline": metrics["roofline_share"], "times_eager": metrics.get("speed_over_eager"),
            "times_compile": metrics.get("speed_over_compile"), "peak_mib": None if peak is None else peak / 2**20}


def size(shape: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in shape.items())


class TextReport:
    """A heading for each case, a line for each variant and direction, a note for what was not timed."""

    def heading(self, case: str) -> None:
        print(f"\n{case}\n" + " ".join(f"{name:>{width}s}" for name, width in COLUMNS.items()), flush=True)

    def line(self, result: Result) -> None:
        cells = row(result)
        print(" ".join(f"{_text(cells[name]):>{width}s}" for name, width in COLUMNS.items()), flush=True)

    def note(self, variant: str, text: str) -> None:
        print(f"{variant:>18s} {text}", flush=True)


class CsvReport:
    """The lines alone on stdout; everything else on stderr."""

    def __init__(self) -> None:
        self._writer = csv.DictWriter(sys.stdout, ["op", "shape", "dtype", *COLUMNS])
        self._writer.writeheader()
        self._case = ""

    def heading(self, case: str) -> None:
        self._case = case

    def line(self, result: Result) -> None:
        self._writer.writerow({name: f"{cell:.5g}" if isinstance(cell, float) else cell
                               for name, cell in row(result).items()})
        sys.stdout.flush()

    def note(self, variant: str, text: str) -> None:
        print(f"{self._case}, {variant}: {text}", file=sys.stderr)


def _text(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:.4g}" if abs(cell) < 1000 else f"{cell:.0f}"
    return "-" if cell is None else str(cell)
