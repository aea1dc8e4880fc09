"""SIGTERM and SIGINT between two instants that belong together: the partial step is dropped, a committed one never is."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(Exception):
    """The process was asked to stop; raised at once, or at the end of the `shielded` block it arrived in."""


class Interrupts:
    """While entered, the first SIGTERM or SIGINT raises Interrupted; a second one acts as if we were not here."""

    def __init__(self) -> None:
        self._depth, self._is_pending, self._previous = 0, False, {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number, frame) -> None:
        self._restore()
        if self._depth:
            self._is_pending = True
        else:
            raise Interrupted

    @contextmanager
    def shielded(self) -> Iterator[None]:
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if self._is_pending and not self._depth:
            self._is_pending = False
            raise Interrupted
