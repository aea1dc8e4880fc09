"""What a device can do at most: bytes copied and GEMM operations per second, and the time it then needs."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

import torch

KNOWN = {("NVIDIA H200", torch.bfloat16): (4.3e12, 790e12)}
"""Ceilings measured once, by long-running copies and GEMMs on an otherwise idle device."""

GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}


class Ceilings(NamedTuple):
    copy_byte_s: float  # read and written bytes both count
    gemm_flop_s: float  # in the dtype of the benchmark
    source: str

    def floor_s(self, num_bytes: int, flops: int) -> float:
        """Least seconds for this much traffic and arithmetic, one hidden behind the other."""
        return max(num_bytes / self.copy_byte_s, flops / self.gemm_flop_s)


def ceilings(device: str, dtype: torch.dtype, seconds: float) -> Ceilings:
    """The device's ceilings: those known, else the best rates met in `seconds` of trying in this process."""
    if device == "cuda" and (known := KNOWN.get((torch.cuda.get_device_name(), dtype))) is not None:
        return Ceilings(*known, "measured before")
    # a CPU kernel may convert to float32 and multiply there, and so be faster than a bfloat16 GEMM
    dtypes = {dtype, torch.float32} if device == "cpu" else {dtype}
    flop_s = max(_gemm_flop_s(device, each, seconds / 2 / len(dtypes)) for each in dtypes)
    return Ceilings(_copy_byte_s(device, seconds / 2), flop_s, "measured in this run")


def _copy_byte_s(device: str, seconds: float) -> float:
    source = torch.ones(COPY_BYTES[device] // 2, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return COPY_BYTES[device] / _best_s(lambda: target.copy_(source), seconds)


def _gemm_flop_s(device: str, dtype: torch.dtype, seconds: float) -> float:
    size = GEMM_SIZE[device]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best_s(lambda: left @ right, seconds)


def _best_s(work: Callable[[], object], seconds: float) -> float:
    """Shortest of the laps that fit into `seconds`, of three at least."""
    laps: list[float] = []
    work()
    begin = perf_counter()
    while len(laps) < 3 or perf_counter() - begin < seconds:
        _wait()
        start = perf_counter()
        work()
        _wait()
        laps.append(perf_counter() - start)
    return min(laps)


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
