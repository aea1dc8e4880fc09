"""A phase of the step under one name: a range in Nsight, an event in torch's profiler, a time in the log.

    with span("update/forward"):
        ...
    with span("rollout") as drawing:
        ...
        drawing.tokens = 512  # or span(..., tokens=512) where the count is known before

While nothing records, a span costs two clock reads and a few checks, one to two microseconds; profiler events and NVTX
ranges are made only while something listens. Names come from `metrics.SPANS`. The clocks belong to the main thread.
"""

from __future__ import annotations

from collections import defaultdict
from time import perf_counter
from typing import Protocol

import torch
from torch.autograd import _profiler_enabled
from torch.compiler import is_compiling

from fastlatent.metrics import SPANS

_HAS_CUDA = torch.version.cuda is not None
_seconds: defaultdict[str, float] = defaultdict(float)
_device_spans: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
_free_events: list[torch.cuda.Event] = []
_watcher: Watcher | None = None


class span:  # noqa: N801 reads as a statement, like torch.no_grad
    """`with span(name):` times the block and shows it to whichever profiler is attached; spans nest.

    On CUDA the time is the stream's, between two events that nobody waits for before `timings()`; host work counts in
    it as long as it keeps the stream waiting. Inside a graph capture or a torch.compile region a span does nothing.

    Args:
        tokens: how many were read or drawn, for profilers: a mark at the end of the range, and the payload of an NVTX
            range whose count was known when it began.
    """

    __slots__ = ("name", "tokens", "_started", "_event", "_recorded")

    def __init__(self, name: str, tokens: int | None = None):
        self.name, self.tokens = name, tokens

    def __enter__(self) -> span:
        self._started = None
        if is_compiling() or (_HAS_CUDA and torch.cuda.is_current_stream_capturing()):
            return self
        if self.name not in SPANS:
            raise KeyError(f"{self.name!r} is not a span; the table is fastlatent.metrics.SPANS")
        if _watcher is not None:
            _watcher.entered(self.name)  # first: it may be what attaches the profiler
        if _ranges is not None:
            _ranges.push(self.name, self.tokens)
        self._recorded = None
        if _profiler_enabled():
            self._recorded = torch.profiler.record_function(self.name)
            self._recorded.__enter__()
        self._event = _mark() if _HAS_CUDA and torch.cuda.is_initialized() else None
        self._started = perf_counter()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._started is None:
            return
        try:
            if self._event is None:
                _seconds[self.name] += perf_counter() - self._started
            else:
                _device_spans.append((self.name, self._event, _mark()))
        finally:  # after an error of the device an event cannot be recorded either
            if self._recorded is not None:
                if self.tokens is not None:
                    with torch.profiler.record_function(f"tokens={self.tokens}"):
                        pass
                self._recorded.__exit__(kind, error, traceback)
            if _ranges is not None:
                if self.tokens is not None:
                    _ranges.count(self.tokens)
                _ranges.pop()
            if _watcher is not None:
                _watcher.left(self.name)


class Watcher(Protocol):
    """Told of every span as it begins, before any profiler sees it, and after it has ended."""

    def entered(self, name: str) -> None: ...

    def left(self, name: str) -> None: ...


def watch(watcher: Watcher | None) -> None:
    """Tell `watcher` of every span from now on; None: nobody. It must not change while a span it was told of is open."""
    global _watcher
    _watcher = watcher


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

    def push(self, name: str, tokens: int | None) -> None:
        if tokens is not None:
            attributes = self._domain.get_event_attributes(message=name, payload=tokens)
        elif (attributes := self._attributes.get(name)) is None:
            attributes = self._attributes[name] = self._domain.get_event_attributes(message=name)
        self._domain.push_range(attributes)

    def count(self, tokens: int) -> None:
        self._domain.mark(self._domain.get_event_attributes(message="tokens", payload=tokens))


class _TorchNvtx:
    """Ranges of torch's own NVTX binding, which knows neither domains nor payloads."""

    pop = staticmethod(torch.cuda.nvtx.range_pop)

    def push(self, name: str, tokens: int | None) -> None:
        torch.cuda.nvtx.range_push(name)

    def count(self, tokens: int) -> None:
        torch.cuda.nvtx.mark(f"tokens={tokens}")


def _nvtx_ranges() -> _NvtxDomain | _TorchNvtx | None:
    """How to make NVTX ranges in this process; None where no tool listens, which is settled when a process starts."""
    try:
        import nvtx
    except ModuleNotFoundError:
        return _TorchNvtx() if _HAS_CUDA else None  # torch cannot say whether a tool listens
    domain = nvtx.get_domain("fastlatent")
    return _NvtxDomain(domain) if isinstance(domain, nvtx.Domain) else None


_ranges = _nvtx_ranges()
