"""Timing of kernels: cold caches, one CUDA graph per measurement, variants interleaved.

A GPU is timed by events around a graph's replay, so that no launch of Python's counts; a CPU by its clock, within a
limit of seconds. Between any two measurements a buffer larger than the last-level cache is rewritten.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

MIN_ROUNDS, MAX_ROUNDS = 5, 50
"""Rounds on a CPU, whose number follows from the limit of seconds; a GPU always does the most."""

CPU_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


@dataclass(frozen=True, slots=True)
class Work:
    """What is timed is `run`, of what `prepare`, which is not timed, has just returned."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] | None = None  # None: `run` is given None

    def state(self) -> Any:
        return None if self.prepare is None else self.prepare()


@dataclass(frozen=True, slots=True)
class Replay:
    """A `Work` captured in CUDA graphs, replayed one after the other; `held` keeps alive what they read."""

    run: torch.cuda.CUDAGraph
    prepare: torch.cuda.CUDAGraph | None
    held: tuple[Any, Any]


def flusher(device: str) -> Callable[[], object]:
    """A function that leaves nothing of what ran before it in the last-level cache."""
    if device == "cuda":
        # at least 256 MiB also keep a GPU busy until the launch of what is timed has been queued
        size_bytes = max(2**28, 2 * torch.cuda.get_device_properties(0).L2_cache_size)
    else:
        size_bytes = 2 * _cpu_cache_bytes()
    buffer = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
    # read and written: plain stores may bypass the cache and evict nothing
    return lambda: buffer.add_(1)


def rounds_within(seconds: float, round_s: float) -> int:
    """Rounds of `round_s` that fit into `seconds`, at least MIN_ROUNDS and at most MAX_ROUNDS."""
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / max(round_s, 1e-6))))


def captured(work: Work) -> Replay:
    """`work` as CUDA graphs; RuntimeError where it does what a graph cannot hold, such as waiting for the device."""
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # what is lazily made is made outside of the capture
            work.run(work.state())
    torch.cuda.synchronize()
    prepare, run, state = None, torch.cuda.CUDAGraph(), None
    # one stream: a backward pass runs on that of its forward pass, which is captured first
    if work.prepare is not None:
        prepare = torch.cuda.CUDAGraph()
        with torch.cuda.graph(prepare, pool=pool, stream=stream):
            state = work.prepare()
    with torch.cuda.graph(run, pool=pool, stream=stream):
        out = work.run(state)
    return Replay(run, prepare, (state, out))


def interleave(works: Mapping[str, Work | Replay], rounds: int, flush: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of every round of every variant; the order turns with each round."""
    names, laps = list(works), {name: [] for name in works}
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                laps[name].append(lap(works[name], flush))
    finally:
        gc.enable()
    return laps


def lap(work: Work | Replay, flush: Callable[[], object]) -> float:
    """Seconds of one run from cold caches."""
    if isinstance(work, Replay):
        if work.prepare is not None:
            work.prepare.replay()
        return _device_s(work.run.replay, flush)
    state = work.state()
    if torch.cuda.is_initialized():
        return _device_s(lambda: work.run(state), flush)
    flush()
    start = perf_counter()
    out = work.run(state)
    end = perf_counter()
    del out  # only now: giving memory back is not part of it
    return end - start


def _device_s(run: Callable[[], object], flush: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _cpu_cache_bytes() -> int:
    try:
        return 1024 * int(CPU_CACHE.read_text().strip().removesuffix("K"))
    except (OSError, ValueError):
        return 2**26  # not told: more than most have
