"""A phase of the step under one name: a range in Nsight, an event in torch's profiler, a time in the log.

    with span("update/forward"):
        ...
    with span("rollout") as drawing:
        ...
        drawing.tokens = 512  # or span(..., tokens=512) where the count is known before

While nothing records and there is no CUDA, a span costs about half a microsecond: an object, two clock reads and a sum
(`python -m benches.span`). Profiler events and NVTX ranges are made only while something listens. Names come from
`metrics.SPANS`. The clocks belong to the main thread.

`capture` turns a profiler on for some steps of a run; `readers`, `timeline` and `page` make of what it wrote the report that
`python -m fastlatent.profile_report` prints.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Protocol

import torch
from torch.autograd import profiler as torch_profiler
from torch.compiler import is_compiling

from fastlatent.metrics import SPANS

_HAS_CUDA = torch.version.cuda is not None
_seconds: dict[str, float] = {}
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

    __slots__ = ("name", "tokens", "_started")

    def __init__(self, name: str, tokens: int | None = None):
        self.name, self.tokens = name, tokens

    def __enter__(self) -> span:
        if is_compiling():
            self._started = None
        elif _HAS_CUDA or _ranges is not None or _watcher is not None or torch_profiler._is_profiler_enabled:
            self._started = None if _is_capturing() else _Shown(self.name, self.tokens)
        else:
            self._started = perf_counter()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        started = self._started
        if type(started) is float:
            seconds = perf_counter() - started
            try:
                _seconds[self.name] += seconds
            except KeyError:
                _seconds[_checked(self.name)] = seconds
        elif started is not None:
            started.end(self.tokens, kind, error, traceback)


class _Shown:
    """A span while somebody looks at it, or on a device: what has to be ended again."""

    __slots__ = ("name", "started", "event", "recorded")

    def __init__(self, name: str, tokens: int | None):
        self.name = _checked(name)
        if _watcher is not None:
            _watcher.entered(name)  # first: it may be what attaches the profiler
        if _ranges is not None:
            _ranges.push(name, tokens)
        self.recorded = None
        if torch_profiler._is_profiler_enabled:
            self.recorded = torch.profiler.record_function(name)
            self.recorded.__enter__()
        self.event = _mark() if _HAS_CUDA and torch.cuda.is_initialized() else None
        self.started = perf_counter()

    def end(self, tokens: int | None, kind, error, traceback) -> None:
        try:
            if self.event is None:
                _seconds[self.name] = _seconds.get(self.name, 0.0) + perf_counter() - self.started
            else:
                _device_spans.append((self.name, self.event, _mark()))
        finally:  # after an error of the device an event cannot be recorded either
            if self.recorded is not None:
                if tokens is not None:
                    with torch.profiler.record_function(f"tokens={tokens}"):
                        pass
                self.recorded.__exit__(kind, error, traceback)
            if _ranges is not None:
                if tokens is not None:
                    _ranges.count(tokens)
                _ranges.pop()
            if _watcher is not None:
                _watcher.left(self.name)


def _is_capturing() -> bool:
    # a torch built with CUDA raises where it is asked for the current stream of a machine without a driver
    return _HAS_CUDA and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _checked(name: str) -> str:
    if name not in SPANS:
        raise KeyError(f"{name!r} is not a span; the table is fastlatent.metrics.SPANS")
    return name


@contextmanager
def apart() -> Iterator[None]:
    """Spans in here are shown to profilers and counted in no time: the span around them has theirs, and is not the one of which
    their names say that they are parts. So the forward passes of scoring are no part of the update's time."""
    global _seconds, _device_spans
    kept = _seconds, _device_spans
    _seconds, _device_spans = {}, []
    try:
        yield
    finally:
        _seconds, _device_spans = kept


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
        _seconds[name] = _seconds.get(name, 0.0) + start.elapsed_time(end) / 1e3
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
        from nvtx import Domain, get_domain
    except ImportError:  # absent, or older than 0.2.12, which could not say whether a tool listens, as torch cannot
        return _TorchNvtx() if _HAS_CUDA else None
    domain = get_domain("fastlatent")
    return _NvtxDomain(domain) if isinstance(domain, Domain) else None


_ranges = _nvtx_ranges()
