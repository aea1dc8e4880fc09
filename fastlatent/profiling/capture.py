"""Recording steps of a run with a profiler: which ones, and what is done with what it saw.

    profile.steps=3:5                          a Chrome trace of steps 3, 4 and 5 and, on a GPU, a memory snapshot
    profile.steps=3:5 profile.tool=nsys        the CUDA profiler is on during these steps; Nsight Systems records them
    profile.steps=3 profile.ranges=rollout     only while a span of that name is open: one trace for each time

Nsight attaches when a process starts, so a run that asks for it and was started without it ends in the command to start.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch.profiler import ProfilerActivity

from fastlatent import profiling
from fastlatent.errors import UserError
from fastlatent.schema import Config

NSIGHT = ("NSYS_PROFILING_SESSION_ID", "NV_NSIGHT_INJECTION_TRANSPORT_TYPE", "CUDA_INJECTION64_PATH", "NVTX_INJECTION64_PATH")
"""Variables of the environment that nsys or ncu sets in what it starts."""

MAX_ALLOCATIONS = 100_000
"""Most allocator events a memory snapshot holds; older ones are dropped. Each carries its stack, some kilobytes of JSON."""


class Recorder(Protocol):
    """A profiler: `stop` returns what to tell about what was recorded since `start`."""

    def start(self) -> None: ...

    def stop(self, name: str) -> list[str]: ...


class Capture:
    """While entered, records the steps that the configuration asks for; `note` is given the sentences about it.

    A step that ends in an exception is recorded up to there; its trace is written when the capture is left.
    """

    def __init__(self, config: Config, folder: Path, note: Callable[[str], None]):
        self._window, self._ranges, self._note = config.profile.window, config.profile.spans, note
        self._recorder: Recorder = (TorchRecorder if config.profile.tool == "torch" else CudaRecorder)(folder, config)
        self._step = self._first = self._depth = 0  # of the step now, of the first recorded, of open spans of profile.ranges
        self._is_on, self._names = False, set()

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._close()
        if self._window and not self._names:
            steps = f"steps {self._window[0]} to {self._window[-1]}"
            self._note(f"profile: nothing was recorded: {steps} were not trained here, or had no such range")

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Training step `number`, counted from 1 as in the log, with the evaluation and the checkpoint that follow it."""
        self._step = number
        if number in self._window and not self._first:
            self._first = number
            if self._ranges:
                profiling.watch(self)
            else:
                self._start()
        yield
        if self._first and number == self._window[-1]:
            self._close()

    def entered(self, name: str) -> None:
        if name in self._ranges:
            if not self._depth:
                self._start()
            self._depth += 1

    def left(self, name: str) -> None:
        if name in self._ranges:
            self._depth -= 1
            if not self._depth:
                self._stop(name)

    def _close(self) -> None:
        profiling.watch(None)
        self._stop()

    def _start(self) -> None:
        self._recorder.start()
        self._is_on = True

    def _stop(self, range_: str | None = None) -> None:
        if self._is_on:
            self._is_on = False
            for sentence in self._recorder.stop(self._name(range_)):
                self._note(f"profile: {sentence}")

    def _name(self, range_: str | None) -> str:
        """Of the files to write: a span entered several times in one step has one for each."""
        if range_ is not None:
            base = f"step-{self._step}-{range_.replace('/', '-')}"
        else:
            base = f"step-{self._step}" if self._step == self._first else f"steps-{self._first}-{self._step}"
        name, count = base, 1
        while name in self._names:
            count += 1
            name = f"{base}-{count}"
        self._names.add(name)
        return name


# ---- profilers ------------------------------------------------------------------------------------------------------


class CudaRecorder:
    """Switches on whichever profiler is attached to CUDA: nsys or ncu, told to wait for it."""

    def __init__(self, folder: Path, config: Config):
        self._config = config

    def start(self) -> None:
        torch.cuda.synchronize()  # nothing of the steps before
        torch.cuda.profiler.start()

    def stop(self, name: str) -> list[str]:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        output = output_of(self._config)
        if self._config.profile.tool == "ncu":
            return [f"ncu has {name}; open {output}.ncu-rep with ncu-ui, or ncu --import"]
        export = f"nsys export --type sqlite {output}.nsys-rep"
        if self._config.profile.spans:  # a report for each time, and an export takes one
            export = f'for report in {output}*.nsys-rep; do nsys export --type sqlite "$report"; done'
        return [f"nsys has {name}; when it has written its report: {export}; then python -m fastlatent.profile_report on the "
                "sqlite file"]


class TorchRecorder:
    """torch.profiler, as a Chrome trace in the run folder's `profile/`, with a snapshot of the allocator of CUDA.

    The snapshot is JSON of what torch gives (segments, blocks, and the events of the allocator with their stacks): torch's own
    file of it, which https://pytorch.org/memory_viz reads, would be a pickle.
    """

    def __init__(self, folder: Path, config: Config):
        self._folder = folder / "profile"
        self._is_cuda = config.model.device != "cpu" and torch.cuda.is_available()
        self._has_excused = False

    def start(self) -> None:
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if self._is_cuda else [ProfilerActivity.CPU]
        if self._is_cuda:
            torch.cuda.synchronize()
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=MAX_ALLOCATIONS)
        self._profile = torch.profiler.profile(activities=activities)
        self._profile.start()

    def stop(self, name: str) -> list[str]:
        self._profile.stop()
        self._folder.mkdir(exist_ok=True)
        trace = self._folder / f"{name}.json.gz"
        self._profile.export_chrome_trace(str(trace))
        said = [f"wrote {trace}; python -m fastlatent.profile_report {trace} sums it up"]
        if not self._is_cuda:
            if not self._has_excused:
                said.append("no memory snapshot, because torch keeps the history of CUDA's allocator alone")
            self._has_excused = True
            return said
        snapshot = self._folder / f"{name}-memory.json"
        snapshot.write_text(json.dumps(torch.cuda.memory._snapshot(), default=str))
        torch.cuda.memory._record_memory_history(enabled=None)
        return [*said, f"wrote {snapshot}"]


# ---- Nsight ---------------------------------------------------------------------------------------------------------


def check(config: Config, argv: Sequence[str]) -> None:
    """UserError where the profiler that the configuration names would record nothing, with the command under which it would."""
    tool, is_attached = config.profile.tool, any(name in os.environ for name in NSIGHT)
    if config.profile.steps is None or tool == "none":
        return
    if tool == "torch":
        if is_attached:
            raise UserError("profile.tool: torch cannot record while Nsight does; wanted profile.tool=nsys or profile.tool=ncu")
        return
    if config.model.device == "cpu" or not torch.cuda.is_available():
        raise UserError(f"profile.tool: {tool} records what a GPU does, and this run has none; torch records on a CPU too")
    if not is_attached:
        missing = "" if shutil.which(tool) else f" (and {tool} is not on the PATH)"
        raise UserError(f"profile.tool: {tool} has to start this process{missing}: {command(config, argv)}")


def command(config: Config, argv: Sequence[str]) -> str:
    """The command line that trains under the configuration's profiler."""
    module = "fastlatent.train" if config.sft is None else "fastlatent.sft"
    train = [sys.executable, "-m", module, *argv] if argv else [sys.executable, *sys.argv]
    if config.profile.tool == "ncu":
        words = ["ncu", "--profile-from-start", "off", "--nvtx", "--force-overwrite", "--export", output_of(config)]
    else:
        end = "repeat" if config.profile.spans else "stop"
        words = ["nsys", "profile", "--trace=cuda,nvtx,osrt,cublas", "--capture-range=cudaProfilerApi",
                 f"--capture-range-end={end}", "--cuda-graph-trace=node", "--force-overwrite=true",
                 f"--output={output_of(config)}"]
    return shlex.join([*words, *train])


def output_of(config: Config) -> str:
    """Where Nsight writes its report, without the ending; not the run folder, which does not exist when Nsight starts."""
    window = config.profile.window
    return f"{config.recipe}-steps-{window[0]}-{window[-1]}"
