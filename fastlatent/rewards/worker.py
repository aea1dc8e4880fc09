"""A reward worker: `python -m fastlatent.rewards.worker FD PARENT_PID`, started and killed by the pool.

It speaks JSON lines over the socket FD: in come one line of set-up and one line per completion, out goes one line per
reward. Its standard streams carry nothing, so user code may print. It must start fast: no torch here.
"""

from __future__ import annotations

import ctypes
import json
import math
import numbers
import os
import signal
import socket
import sys
import traceback
from typing import Any

from fastlatent.errors import UserError
from fastlatent.rewards.load import Reward, load_reward


def main(fd: int, parent_pid: int) -> None:
    die_with_parent(parent_pid)
    connection = socket.socket(fileno=fd)
    connection.set_inheritable(False)
    lines = connection.makefile("rb")

    def reply(message: dict[str, Any]) -> None:
        connection.sendall(json.dumps(message).encode() + b"\n")

    setup = json.loads(lines.readline())
    sys.path += [path for path in setup["import_path"] if path not in sys.path]
    try:
        rewards = [load_reward(**spec, columns=setup["columns"]) for spec in setup["rewards"]]
    except UserError as error:
        return reply({"error": str(error)})
    limit_memory(setup["memory_mb"])
    reply({"ready": True})
    pid = os.getpid()
    for line in lines:
        job = json.loads(line)
        for index in range(job["start"], len(rewards)):
            outcome = _outcome(rewards[index], job["arguments"])
            if os.getpid() != pid:  # user code forked and let the copy return: it must not answer too
                os._exit(0)
            reply({"index": index, **outcome})


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies, even while user code hangs (Linux only).

    Elsewhere an idle worker ends at the end of its input, and a hanging one when its call returns.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent_pid:  # it died before we asked
            os._exit(1)


def limit_memory(size_mb: int) -> None:
    """Let this process map `size_mb` more than it does now, after imports (which map much and touch little)."""
    if sys.platform == "linux":
        import resource

        with open("/proc/self/statm") as statm:
            mapped_bytes = int(statm.read().split()[0]) * resource.getpagesize()
        limit_bytes = mapped_bytes + size_mb * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _outcome(reward: Reward, arguments: dict[str, Any]) -> dict[str, Any]:
    """{"value": float}, or {"missing": kind, "message": sentence} with a counter of RewardReport as the kind."""
    try:
        value = reward(arguments)
        number = _number(value)
    except MemoryError:
        return {"missing": "num_memory_errors", "message": "out of memory"}
    except TimeoutError as error:
        return {"missing": "num_timeouts", "message": str(error)}
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: user code must not end the worker unseen
        return {"missing": "num_exceptions", "message": _describe(error)}
    if value is None:
        return {"missing": "num_none", "message": ""}
    if not math.isfinite(number):
        return {"missing": "num_invalid", "message": f"returned {_short(value)}, wanted a finite number or None"}
    return {"value": number}


def _number(value: Any) -> float:
    """`value` as a float; not finite where it is no finite number, or too large for a float."""
    try:
        return float(value) if isinstance(value, numbers.Real) else math.nan
    except OverflowError:
        return math.inf


def _describe(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__, limit=-1)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {_short(error, str)}{place}"


def _short(value: Any, text=repr) -> str:
    try:
        return text(value)[:200]
    except Exception:  # a user's own __repr__ may raise anything
        return f"a {type(value).__name__}"


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
