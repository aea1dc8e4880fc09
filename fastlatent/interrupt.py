"""SIGTERM, SIGINT, SIGHUP between two instants that belong together: the partial step is dropped, a committed one never is."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(Exception):
    """The process was asked to stop; raised at once, or at the end of the `shielded` block it arrived in."""


class Interrupts:
    """While entered, the first SIGTERM, SIGINT or SIGHUP raises Interrupted; a second one acts as if we were not here.

    But for SIGHUP: it stays ignored where it was (nohup), and is not heard again, as shell and kernel both send it when a
    terminal is closed, and some service managers after SIGTERM.
    """

    def __init__(self) -> None:
        self._depth, self._is_pending, self._previous = 0, False, {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            heard = [signal.SIGTERM, signal.SIGINT]
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                heard.append(signal.SIGHUP)
            self._previous = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number, frame) -> None:
        previous = self._previous
        self._restore()
        if signal.SIGHUP in previous:
            self._previous = {signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
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
