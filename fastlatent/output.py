"""A file to write to whose reader may go away: `| head` has seen enough, a pager is left, a terminal is closed.

What a command is for lies in the files it writes, so the end of its reader is no reason to lose them, and none to stop: whoever
wants it to stop has signals for that.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO


class Output:
    """`file`, until it cannot be written any more: then `notice` on stderr, where there is one, and from there on silence.

    `error` is the reason, None as long as there is none. An Output of an Output is another one of its file.
    """

    def __init__(self, file: TextIO, notice: str = ""):
        self._file, self._notice = file._file if isinstance(file, Output) else file, notice
        self.error: OSError | None = None

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        try:
            return self._file.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        _discard(self._file)
        if self.error is None and self._notice and sys.__stderr__ is not None:
            try:  # not sys.stderr, which a live view shows above itself
                print(f"the output cannot be written any more ({error.strerror}); {self._notice}", file=sys.__stderr__,
                      flush=True)
            except OSError:  # on the same terminal
                _discard(sys.__stderr__)
        self.error = self.error or error


def _discard(file: TextIO) -> None:
    """Let everything that is written there vanish, what waits in its buffer included, which is written when Python exits."""
    with suppress(OSError):  # no file of the operating system's
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, file.fileno())
        os.close(null)
