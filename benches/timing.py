"""Timing variants against each other: one process, interleaved rounds, a warm-up first, medians of what is left.

Rounds are interleaved so that a slow minute of the machine falls on every variant alike; the order turns with each
round, so that none of them always runs in the same one's wake. Ratios are taken within a round, then their median.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter, process_time

import torch


@dataclass(frozen=True, slots=True)
class Lap:
    """One run of one variant. `work` is what it returned: how much it got done."""

    wall_s: float
    cpu_s: float  # of all threads of this process
    work: float

    @property
    def rate(self) -> float:
        return self.work / self.wall_s


def interleave(variants: Mapping[str, Callable[[int], float]], rounds: int, warmup: int = 1) -> dict[str, list[Lap]]:
    """`rounds` laps of every variant, after `warmup` rounds that are not kept.

    A variant is called with the number of the round, from 0 and warm-up included: what it draws at random should
    follow from that, so that all variants of a round do the same.
    """
    names, laps = list(variants), {name: [] for name in variants}
    gc.freeze()  # what is there already need not be searched again by the collection before each lap
    try:
        for number in range(warmup + rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                lap = _lap(variants[name], number)
                if number >= warmup:
                    laps[name].append(lap)
    finally:
        gc.unfreeze()
    return laps


def seconds(laps: Sequence[Lap]) -> dict[str, list[float]]:
    """Wall and CPU seconds of every lap, by metric name."""
    return {"wall_s": [lap.wall_s for lap in laps], "cpu_s": [lap.cpu_s for lap in laps]}


def _lap(variant: Callable[[int], float], number: int) -> Lap:
    gc.collect()
    wait_for_device()
    wall, cpu = perf_counter(), process_time()
    work = variant(number)
    wait_for_device()
    return Lap(perf_counter() - wall, process_time() - cpu, work)


def wait_for_device() -> None:
    """Until what was asked of a GPU is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
