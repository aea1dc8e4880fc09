"""One run of the kernels' benchmark: which shapes fit, every variant of a case in every direction, and its lines."""

from __future__ import annotations

from argparse import Namespace
from statistics import median
from time import perf_counter
from typing import Any

import torch
from fastlatent_kernels.dispatch import Op

from benches import kernels_cases
from benches.kernels_cases import Case
from benches.kernels_clock import MAX_ROUNDS, MIN_ROUNDS, Replay, Work, captured, flusher, interleave, rounds_within
from benches.kernels_report import CsvReport, TextReport, size
from benches.kernels_roofline import ceilings
from benches.kernels_variants import COMPILE, EAGER, lineup
from benches.memory import peak_bytes
from benches.results import Result

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Laps = dict[str, list[float]]  # variant -> its seconds in every round


class Bench:
    """The machine's ceilings and what else all cases of one run share."""

    def __init__(self, args: Namespace):
        self.args = args
        self.device, self.dtype = args.device, DTYPES[args.dtype]
        self.limits = ceilings(self.device, self.dtype, 0.0 if args.quick else 2.0)
        self.flush = flusher(self.device)
        self.report = CsvReport() if args.csv else TextReport()

    def shapes(self, op: Op) -> list[dict[str, Any]]:
        """Those to measure of an op; one that a CPU would take too long for is noted and left out."""
        fitting = []
        for shape in kernels_cases.shapes(op, self.args.model, self.args.quick):
            if self.args.rows is not None and kernels_cases.rows(shape) > self.args.rows:
                continue
            least_s = MIN_ROUNDS * kernels_cases.floor_s(op, shape, self.dtype, self.limits)
            if self.device == "cuda" or least_s <= self.args.seconds:
                fitting.append(shape)
            else:
                self.report.heading(self._name(op, shape))
                self.report.note("all", f"n/a: {MIN_ROUNDS} forward passes at this CPU's roofline take {least_s:.0f} s")
        return fitting[-1:] if self.args.headlines else fitting

    def run(self, op: Op, shape: dict[str, Any], is_last: bool) -> list[Result]:
        """The lines of one shape of an op. Of the last one those of its widest direction are headlines."""
        self.report.heading(self._name(op, shape))
        case = kernels_cases.make(op, shape, self.dtype, self.device)
        backends = op.order if self.args.backend is None else (self.args.backend,)
        works, refused = lineup(case, [backend for backend in backends if backend != "reference"], not self.args.no_compile)
        for variant, reason in refused.items():
            self.report.note(variant, f"n/a: {reason}")
        found = []
        for direction, variants in works.items():
            found += self._lines(case, direction, variants, is_last and direction == case.directions[-1])
        return found

    def _lines(self, case: Case, direction: str, works: dict[str, Work], is_headline: bool) -> list[Result]:
        ready = {variant: self._ready(variant, work) for variant, work in works.items()}
        laps = interleave(ready, self._rounds(ready), self.flush)
        num_bytes, flops, name = case.bytes_moved(direction), case.flops(direction), self._name(case.op, case.shape)
        shared = {
            "op": case.op.name, "shape": case.shape, "direction": direction, "dtype": self.args.dtype,
            "device": self.device, "model": self.args.model or "shapes of the ops", "is_headline": is_headline,
            "chosen": case.op.chosen(**case.inputs), "bytes_moved": num_bytes, "flops": flops,
            "ceilings": self.limits._asdict()}
        found = []
        for variant, seconds in laps.items():
            # after the laps, for it hands memory back to the system
            samples = samples_of(laps, variant, self.limits.floor_s(num_bytes, flops)) | _peak(works[variant])
            facts = {"gb_s": num_bytes / median(seconds) / 1e9,
                     "tflop_s": flops / median(seconds) / 1e12 if flops else None,
                     "rounds": len(seconds), "cuda_graph": isinstance(ready[variant], Replay)}
            found.append(Result(bench="kernels", case=f"{name} {direction}", variant=variant, samples=samples,
                                facts=shared | facts))
            self.report.line(found[-1])
        return found

    def _name(self, op: Op, shape: dict[str, Any]) -> str:
        return f"{op.name} {size(shape)} {self.args.dtype}"

    def _ready(self, variant: str, work: Work) -> Work | Replay:
        if self.device != "cuda":
            return work
        try:
            return captured(work)
        except RuntimeError:  # it waits for the device
            torch.cuda.synchronize()
            self.report.note(variant, "timed without a CUDA graph, which cannot hold it")
            return work

    def _rounds(self, works: dict[str, Work | Replay]) -> int:
        if self.args.quick:
            return 2
        if self.device == "cuda":
            return MAX_ROUNDS
        start = perf_counter()
        interleave(works, 1, self.flush)
        return rounds_within(self.args.seconds, perf_counter() - start)


def samples_of(laps: Laps, variant: str, floor_s: float) -> dict[str, list[float]]:
    """Metrics of a variant in every round; ratios are taken within a round."""
    own = laps[variant]
    samples = {"wall_s": own, "roofline_share": [floor_s / lap for lap in own]}
    for metric, other in (("speed_over_eager", EAGER), ("speed_over_compile", COMPILE)):
        if other in laps and other != variant:
            samples[metric] = [theirs / lap for theirs, lap in zip(laps[other], own, strict=True)]
    return samples


def _peak(work: Work) -> dict[str, list[float]]:
    """Memory of what is timed alone; nothing where the system does not tell."""
    state = work.state()
    peak = peak_bytes(lambda: work.run(state))
    return {} if peak is None else {"peak_bytes": [float(peak)]}
