"""Every op on every backend once, forward and backward, at its test shapes: what ran, what refused and why.

    python -m benches.every_kernel [--device cuda] [--largest 1000000]

A driver for NVIDIA's checkers, and the list of what a device runs at all: the tests pass where a backend refuses. Numbers are
the tests' business; here a call must end and leave no NaN. Exits with 1 where one did not, or
where a backend that belongs on this device refused everything.
"""

from __future__ import annotations

import sys
from collections import Counter
from functools import partial
from math import prod

import torch
from fastlatent_kernels import OPS
from fastlatent_kernels.dispatch import Op

from benches import kernels_cases
from benches.kernels_bench import DTYPES
from benches.kernels_cases import Case
from benches.kernels_report import size
from fastlatent.cli import Parser, run_command
from fastlatent.errors import UserError

EXPECTED = {"cpu": {"native"}, "cuda": {"triton", "cuda"}}
"""Backends of which a device must run something, for every op that has them."""


def run(case: Case, backend: str) -> None:
    """`case` forward and backward; ValueError where a NaN comes out."""
    implementation = partial(case.op, backend=backend, **case.inputs)
    work = case.work(lambda: case.picked(implementation()), "both" if case.differentiable else "forward")
    found = work.run(work.state())
    if any(tensor is not None and tensor.is_floating_point() and bool(tensor.isnan().any()) for tensor in found):
        raise ValueError("NaN came out")


def attempt(op: Op, shape: dict, dtype_name: str, device: str, counts: dict[str, Counter]) -> list[str]:
    """Run one shape on every backend, counting what ran and what refused; a line for each that broke."""
    case, broken = kernels_cases.make(op, shape, DTYPES[dtype_name], device), []
    for backend in op.order:
        reason = op.why_not(backend, **case.inputs)
        if reason is not None:
            counts[backend][f"refused: {reason}"] += 1
            continue
        print(f"{op.name} {backend} {dtype_name} {size(shape)}", flush=True)  # before: a crash must have a name
        try:
            run(case, backend)
        except Exception as error:
            if "CUDA" in str(error) and "error" in str(error).lower():
                raise  # the device is lost to this process
            broken.append(f"{op.name} [{backend}] {dtype_name} {size(shape)}: {type(error).__name__}: "
                          f"{str(error).splitlines()[0]}")
        else:
            counts[backend][dtype_name] += 1
    return broken


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m benches.every_kernel", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--largest", type=int, default=10**7, metavar="N",
                        help="leave out shapes of more elements (default: 1e7)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: there is no CUDA device here")
    report, broken = [], []
    for op in OPS.values():
        counts: dict[str, Counter] = {backend: Counter() for backend in op.order}
        for shape in kernels_cases.module(op).TEST_SHAPES:
            if prod(value for value in shape.values() if isinstance(value, int) and value) <= args.largest:
                for dtype_name in DTYPES:
                    broken += attempt(op, shape, dtype_name, args.device, counts)
        for backend, seen in counts.items():
            ran = sum(seen[name] for name in DTYPES)
            if seen and not ran and backend in EXPECTED[args.device]:
                broken.append(f"{op.name} [{backend}] refused every shape")
            if backend in EXPECTED[args.device] or ran:
                said = ", ".join(f"{count} {what}" for what, count in seen.items())
                report.append(f"on {args.device}: {op.name} [{backend}]: {said or 'nothing to run'}")
    if args.device == "cuda":
        torch.cuda.synchronize()
    print("\n".join([*report, *(f"BROKEN {line}" for line in broken)]))
    return int(bool(broken))


if __name__ == "__main__":
    run_command(main)
