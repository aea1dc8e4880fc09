"""Measures what the automatic choice of a backend follows, and writes it to fastlatent_kernels/measured.json.

    OMP_NUM_THREADS=1 python -m benches.kernels_choice [--op OP] [--seconds S]

Every backend that the choice has to weigh against the reference on this machine's device, at few rows and many, in both
types, forward and with its backward pass, from cold caches, interleaved: the ratio of their quick laps, whose times a
busy machine changes least. A line keeps the least of the op's shapes. Lines of the other ops and devices stay as they
are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import torch
from fastlatent_kernels import OPS, measured
from fastlatent_kernels.dispatch import Op

from benches import kernels_cases
from benches.kernels_bench import DTYPES
from benches.kernels_clock import MIN_ROUNDS, flusher, interleave, rounds_within
from fastlatent import manifest
from fastlatent.cli import Parser, run_command
from fastlatent.errors import UserError

ROWS = (1, 8, 64, 512)
DIRECTIONS = ("forward", "both")  # a rollout's and an update's: backward is never called alone
SLOWEST_S = 1.0
"""A call that takes longer is no place where a choice of backend is in doubt; more rows are not measured."""


def lines(op: Op, device: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Those of one op: each backend that can run, at each number of rows."""
    flush, machine = flusher(device), machine_name()
    for num_rows in ROWS:
        slowest: dict[tuple[str, str, str], float] = {}
        for shape in shapes(op, num_rows):
            for type_name, dtype in DTYPES.items():
                case = kernels_cases.make(op, shape, dtype, device)
                for direction in (name for name in DIRECTIONS if name in case.directions):
                    for backend, speed in speeds(case, direction, flush, seconds).items():
                        key = backend, direction, type_name
                        slowest[key] = min(speed, slowest.get(key, speed))
        for (backend, direction, type_name), speed in slowest.items():
            yield {"op": op.name, "backend": backend, "device": device, "direction": direction, "dtype": type_name,
                   "rows": num_rows, "speed": float(f"{speed:.3g}"), "machine": machine}
        if not slowest:
            return


def shapes(op: Op, num_rows: int) -> list[dict[str, Any]]:
    """The op's benchmark shapes of the smallest model with so many rows."""
    found = kernels_cases.shapes(op, "smollm2-135m", False)
    letter = next(iter(found[0]))
    found = [shape | {letter: num_rows} for shape in found]
    return [shape for i, shape in enumerate(found) if shape not in found[:i]]


def speeds(case: kernels_cases.Case, direction: str, flush: Callable[[], object], seconds: float) -> dict[str, float]:
    """Of each backend that can run and is not left out by rule, in that of the reference; none where that is slow."""
    names = [name for name in case.op.order if case.op.why_not(name, **case.inputs) is None
             and case.op.by_rule(name, **case.inputs) is None]
    if not names:
        return {}
    works = {}
    for name in ("reference", *names):
        implementation = partial(case.op, backend=name)  # the choice itself costs every backend the same
        works[name] = case.work(lambda f=implementation: case.picked(f(**case.inputs)), direction)
    start = perf_counter()
    interleave(works, 1, flush)  # what a first call allocates is not timed
    once_s = perf_counter() - start
    if once_s > SLOWEST_S * len(works):
        return {}
    laps = interleave(works, max(MIN_ROUNDS, rounds_within(seconds, once_s)), flush)
    quick = {name: float(np.quantile(of_name, 0.2)) for name, of_name in laps.items()}
    found = {name: quick["reference"] / quick[name] for name in names}
    print(f"{case.op.name:<18}{direction:<10}{str(case.dtype).removeprefix('torch.'):<10}{case.shape}  "
          + "  ".join(f"{name} {speed:.2f}" for name, speed in found.items()), file=sys.stderr, flush=True)
    return found


def machine_name() -> str:
    hardware = manifest.hardware()
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() != 1)}"
    cpu = f"{hardware['cpu']}, {threads}"
    what = hardware["gpus"][0] if hardware["gpus"] else cpu
    return f"{what}, torch {torch.__version__.partition('+')[0]}, {date.today():%Y-%m}"


def write(found: list[dict[str, Any]]) -> None:
    """`found` in place of the lines of the same op, backend and device."""
    key = lambda line: (line["op"], line["backend"], line["device"])
    kept = [line for line in json.loads(measured.FILE.read_text()) if key(line) not in {key(new) for new in found}]
    rows = sorted(kept + found, key=lambda line: (*key(line), line["direction"], line["dtype"], line["rows"]))
    temporary = measured.FILE.with_suffix(".tmp")  # every process that imports the ops reads the file
    temporary.write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n")
    temporary.replace(measured.FILE)


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m benches.kernels_choice", description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", metavar="OP", help="may be repeated (default: every op)")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="for a shape and direction (default: 2)")
    args = parser.parse_args(argv)
    for name in args.op or ():
        if name not in OPS:
            raise UserError(f"--op: {name!r} is not one of {', '.join(sorted(OPS))}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in args.op or sorted(OPS):
        if found := list(lines(OPS[name], device, args.seconds)):  # written op by op: a run that is stopped keeps these
            write(found)


if __name__ == "__main__":
    run_command(main)
