"""One worker process as the pool sees it: JSON lines out and in without ever blocking, and a sure kill."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from typing import Any

_CHUNK_BYTES = 65536


class WorkerProcess:
    """A running `fastlatent.rewards.worker`. The pool owns `task` and `deadline_s`; None means idle."""

    def __init__(self, setup: dict[str, Any], output: int):
        """Start it, with its standard output and error going to the file descriptor `output`, and send `setup`."""
        self.socket, theirs = socket.socketpair()
        with theirs:
            # -P: its sys.path is ours, not ours with the current directory before the standard library
            command = [sys.executable, "-P", "-u", "-m", "fastlatent.rewards.worker"]
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[theirs.fileno()], env=_environment(),
                start_new_session=True)  # a group of its own: killed with its children, deaf to our Ctrl-C
        self.socket.setblocking(False)
        self.is_ready = False
        self.task: Any = None
        self.deadline_s = 0.0
        self._unsent = b""
        self._unread = b""
        self.send(setup | {"import_path": _import_path()})

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    def send(self, message: dict[str, Any]) -> None:
        """Send `message`, as much of it as fits now; `flush` the rest when the socket is writable."""
        self._unsent += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        try:
            self._unsent = self._unsent[self.socket.send(self._unsent):]
        except BlockingIOError:
            pass
        except OSError:  # it is gone; `receive` will say so
            self._unsent = b""

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have arrived; an empty one for a line that is no message.

        Raises:
            EOFError: it has died.
        """
        try:
            chunk = self.socket.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            chunk = b""
        if not chunk:
            raise EOFError
        *lines, self._unread = (self._unread + chunk).split(b"\n")
        return [_message(line) for line in lines]

    def kill(self) -> str:
        """End it and whatever it started, at once, and say how it ended if it had already."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)  # before `wait`: then the group id is still its own
        except ProcessLookupError:
            pass
        code = self._process.wait()
        self.socket.close()
        return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def _import_path() -> list[str]:
    """Ours and the current directory, where users keep their functions."""
    return list(dict.fromkeys([*(path or os.getcwd() for path in sys.path), os.getcwd()]))


def _environment() -> dict[str, str]:
    """Ours, single threaded, with our import path: but for folders with a ':', which only the worker itself can add."""
    paths = (path for path in _import_path() if os.pathsep not in path)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def _message(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}
