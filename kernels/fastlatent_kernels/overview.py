"""Which backend every op would use on this machine, and why not the others."""

from __future__ import annotations

import importlib
from typing import NamedTuple

import torch

from fastlatent_kernels.dispatch import OPS, BackendUnavailable, use_backend


class Choice(NamedTuple):
    op: str
    device: str
    dtype: str
    backend: str  # what a call would use; "none" where a backend named for all ops makes it raise
    refusals: dict[str, str]  # backends that cannot run it, each with the reason
    passed_over: dict[str, str]  # backends that can but would not be chosen, each with the reason
    measured: dict[str, str]  # backends that can, each with what was measured of it here


def choices() -> list[Choice]:
    """One entry per op, device and dtype, for a call of a few rows."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [_choice(name, device, dtype) for name in sorted(OPS) for device in devices
            for dtype in (torch.float32, torch.bfloat16)]


def _choice(name: str, device: str, dtype: torch.dtype) -> Choice:
    op = OPS[name]
    cases = importlib.import_module(f"{op.__module__}.cases")
    with use_backend(None):  # an op may make the inputs of another, which may lack the backend that is named for all
        inputs = cases.make_inputs(cases.TEST_SHAPES[1], dtype=dtype, device=device)
    reasons = {backend: op.why_not(backend, **inputs) for backend in op.order}
    refusals = {backend: reason for backend, reason in reasons.items() if reason is not None}
    passed_over = {backend: reason for backend in op.order if backend not in refusals
                   and (reason := op.passed_over(backend, **inputs)) is not None}
    type_name = str(dtype).removeprefix("torch.")
    measured = {backend: op.measured[backend, device].told(type_name) for backend in op.order
                if backend not in refusals and (backend, device) in op.measured}
    try:
        chosen = op.chosen(**inputs)
    except BackendUnavailable as error:
        chosen, refusals = "none", refusals | {error.backend: error.reason}
    return Choice(name, device, type_name, chosen, refusals, passed_over, measured)
