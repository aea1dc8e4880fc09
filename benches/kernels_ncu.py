"""One launch of one op for Nsight Compute, inside a range of the profiler's own, after a warm-up outside of it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from functools import partial

import torch
from torch.cuda import profiler

from benches.kernels_cases import Case


def launch(case: Case, backend: str, argv: Sequence[str]) -> None:
    """Run `case` once, forward and backward where it has both; print the command that profiles just this."""
    command = ["ncu", "--profile-from-start", "off", "--set", "full", "--export", case.op.name,
               "python", "-m", "benches.kernels", *argv]
    print(f"{shlex.join(command)}\n{case.op.name} [{backend}], {case.directions[-1]}", file=sys.stderr)
    implementation = partial(case.op, backend=backend, **case.inputs)
    work = case.work(lambda: case.picked(implementation()), case.directions[-1])
    for _ in range(3):
        work.run(work.state())
    torch.cuda.synchronize()
    profiler.start()
    work.run(work.state())
    torch.cuda.synchronize()
    profiler.stop()
