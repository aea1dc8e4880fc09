"""What one decode step costs the host: operators dispatched, kernels launched, and how often it waits for the device.

A step is the difference between two draws of unlike length, divided by the tokens between them: prompts, ends and set-up drop
out, whoever's loop it is. `own` is what code of this project asked for, the rest is transformers' or vLLM's. Operators are
those that torch's dispatcher hands to Python: what runs inside one of them (a kernel of ours, a library's, a CUDA graph)
counts as one, and a look at a CPU tensor's memory (`tolist`, `numpy`) is none. The launches and waits of a GPU are those its
driver reports to torch's profiler, launches of graphs included; that part was never run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

SHORT, LONG = 8, 16  # tokens of the two draws

OWN, OTHERS = ("fastlatent", "fastlatent_kernels"), ("transformers", "vllm", "benches")

SYNCS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal"}
"""Operators whose result the host has to look at; so does indexing with a mask."""

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaLaunchCooperativeKernel")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass(slots=True)
class PerStep:
    operators: float = 0.0
    own_operators: float = 0.0
    syncs: float = 0.0
    own_syncs: float = 0.0
    launches: float | None = None  # None where there is no GPU, or no driver that tells
    waits: float | None = None

    def facts(self) -> dict[str, float]:
        return {f"{name}_per_step": round(value, 2) for name, value in asdict(self).items() if value is not None}

    def line(self) -> str:
        gpu = "" if self.launches is None else f", {self.launches:.1f} launches, {self.waits:.1f} waits"
        return (f"a step: {self.operators:.1f} operators, own {self.own_operators:.1f}; {self.syncs:.1f} syncs, own "
                f"{self.own_syncs:.1f}{gpu}")


class Operators(TorchDispatchMode):
    """Counts the operators that are dispatched while it is entered."""

    def __init__(self):
        super().__init__()
        self.counted = PerStep()
        self.own_syncs_seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:  # in inference mode what is made of other operators, as `item` is, comes here whole
            out = function.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        is_own, is_sync = _is_own(sys._getframe(1)), _waits(function._schema.name, args)
        self.counted.operators += 1
        self.counted.own_operators += is_own
        self.counted.syncs += is_sync
        if is_own and is_sync:
            self.counted.own_syncs += 1
            self.own_syncs_seen.append(function._schema.name)
        return function(*args, **kwargs)


def _waits(name: str, args: tuple) -> bool:
    if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return name in SYNCS


def _is_own(frame) -> bool:
    """Whether the innermost code that is not torch's is ours."""
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package in OWN or (package in OTHERS and frame.f_globals["__name__"] != __name__):
            return package in OWN
        frame = frame.f_back
    return False


def per_step(drawing: Callable[[int], Callable[[int], int]], device: torch.device) -> PerStep:
    """`drawing(max_new_tokens)` gives a function that draws exactly so many tokens a row, given the number of the round."""
    draws = {length: drawing(length) for length in (SHORT, LONG)}
    for draw in draws.values():
        draw(0)  # whatever is made at the first call
    found = {}
    for length, draw in draws.items():
        with Operators() as operators:
            draw(1)
        found[length] = operators.counted
        if device.type == "cuda":
            found[length].launches, found[length].waits = _driver_calls(lambda draw=draw: draw(1))
    short, long = (asdict(found[length]) for length in (SHORT, LONG))
    return PerStep(**{name: None if value is None else (long[name] - value) / (LONG - SHORT) for name, value in short.items()})


def _driver_calls(work: Callable[[], object]) -> tuple[int, int] | tuple[None, None]:
    """Launches and waits; None where no launch was reported at all, for there are no draws without any."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        work()
    names = [event.name for event in recorded.events() if event.device_type == DeviceType.CPU]
    launches, waits = (sum(name.startswith(known) for name in names) for known in (LAUNCHES, WAITS))
    return (launches, waits) if launches else (None, None)
