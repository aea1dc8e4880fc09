"""A phase of the step under one name: a range in Nsight, an event in torch's profiler, a time in the log.

    with span("update/forward"):
        ...

While nothing records, a span costs two clock reads and a few checks, about a microsecond; profiler events and NVTX
ranges are made only while something listens. Names come from `metrics.SPANS`. The clocks belong to the main thread.
"""

from __future__ import annotations

from collections import defaultdict
from time import perf_counter

import torch
from torch.autograd import _profiler_enabled
from torch.compiler import is_compiling

from fastlatent.metrics import SPANS

_HAS_CUDA = torch.version.cuda is not None
_seconds: defaultdict[str, float] = defaultdict(float)
_device_spans: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
_free_events: list[torch.cuda.Event] = []


class span:  # noqa: N801 reads as a statement, like torch.no_grad
    """`with span(name):` times the block and shows it to whichever profiler is attached; spans nest.

    On CUDA the time is the stream's, between two events that nobody waits for before `timings()`; host work counts in
    it as long as it keeps the stream waiting. Inside a graph capture or a torch.compile region a span does nothing.
    """

    __slots__ = ("name", "_started", "_event", "_recorded")

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        self._started = None
        if is_compiling() or (_HAS_CUDA and torch.cuda.is_current_stream_capturing()):
            return
        if self.name not in SPANS:
            raise KeyError(f"{self.name!r} is not a span; the table is fastlatent.metrics.SPANS")
        if _ranges is not None:
            _ranges.push(self.name)
        self._recorded = None
        if _profiler_enabled():
            self._recorded = torch.profiler.record_function(self.name)
            self._recorded.__enter__()
        self._event = _mark() if _HAS_CUDA and torch.cuda.is_initialized() else None
        self._started = perf_counter()

    def __exit__(self, kind, error, traceback) -> None:
        if self._started is None:
            return
        if self._event is None:
            _seconds[self.name] += perf_counter() - self._started
        else:
            _device_spans.append((self.name, self._event, _mark()))
        if self._recorded is not None:
            self._recorded.__exit__(kind, error, traceback)
        if _ranges is not None:
            _ranges.pop()


def timings() -> dict[str, float]:
    """Seconds spent in each span that ended since `reset_timings`; on CUDA this waits for the last of them."""
    for name, start, end in _device_spans:
        end.synchronize()
        _seconds[name] += start.elapsed_time(end) / 1e3
        _free_events.extend((start, end))
    _device_spans.clear()
    return dict(_seconds)


def reset_timings() -> None:
    """Begin counting anew."""
    timings()  # an event that has not fired must not be recorded again
    _seconds.clear()


def _mark() -> torch.cuda.Event:
    event = _free_events.pop() if _free_events else torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class _NvtxDomain:
    """Ranges of the NVTX domain `fastlatent`, made by the nvtx package."""

    def __init__(self, domain):
        self._domain, self._attributes, self.pop = domain, {}, domain.pop_range

    def push(self, name: str) -> None:
        if name not in self._attributes:
            self._attributes[name] = self._domain.get_event_attributes(message=name)
        self._domain.push_range(self._attributes[name])


class _TorchNvtx:
    """Ranges of torch's own NVTX binding, which knows no domains."""

    push = staticmethod(torch.cuda.nvtx.range_push)
    pop = staticmethod(torch.cuda.nvtx.range_pop)


def _nvtx_ranges() -> _NvtxDomain | _TorchNvtx | None:
    """How to make NVTX ranges in this process; None where no tool listens, which is settled when a process starts."""
    try:
        import nvtx
    except ModuleNotFoundError:
        return _TorchNvtx() if _HAS_CUDA else None  # torch cannot say whether a tool listens
    domain = nvtx.get_domain("fastlatent")
    return _NvtxDomain(domain) if isinstance(domain, nvtx.Domain) else None


_ranges = _nvtx_ranges()
