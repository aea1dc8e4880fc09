"""Running one command of the battery: its output into the log as it comes, its limit, and what became of it.

Standard library only: nothing of the project can be imported before its build.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer
from time import monotonic

OK, FAILED, STOPPED, REFUSED, SKIPPED = "ok", "failed", "stopped", "refused", "skipped"

REFUSALS = re.compile(r"Device not supported|not supported on this|Unable to (?:find|load) injection|LibraryNotLoaded|"
                      r"ERR_NVGPUCTRPERM|Operation not permitted|is not supported by the (?:driver|device)", re.IGNORECASE)
"""What a tool prints that the machine, not our code, keeps from running."""

EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(?:Error|Exception)(?::|$)")
"""The line of a traceback that names it."""


@dataclass(frozen=True, slots=True)
class Step:
    """A command of a part; `env` is added to the environment."""

    name: str
    command: Sequence[str | Path]
    limit_s: float
    env: Mapping[str, str] = field(default_factory=dict)
    log: str = "log.txt"
    is_tool: bool = False  # may be refused by the machine, or absent
    retry: Step | None = None  # run where this one failed or was stopped
    refusal: str = ""  # why it cannot be run here


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a step. `status` is one of the words above; `lines` what it printed, errors included."""

    status: str
    seconds: float
    note: str
    lines: list[str]


def run(step: Step, out: Path, seconds_left: float) -> Outcome:
    """Run `step`, where it can be, within its limit and what is left; its output goes to `out / step.log` while it comes."""
    if step.refusal:
        return Outcome(SKIPPED, 0.0, step.refusal, [])
    limit_s = min(step.limit_s, seconds_left)
    if limit_s < 5:
        return Outcome(SKIPPED, 0.0, "no time was left", [])
    command, start = [str(word) for word in step.command], monotonic()
    with open(out / step.log, "a", encoding="utf-8", buffering=1) as log:
        print(f"\n$ {shlex.join(command)}    [{step.name}, at most {limit_s:.0f} s]", file=log)
        try:
            # a process group of its own: a limit must end compilers and workers, too
            process = subprocess.Popen(command, env=os.environ | dict(step.env), stdout=subprocess.PIPE, text=True,
                                       stderr=subprocess.STDOUT, errors="replace", start_new_session=True)
        except OSError as error:
            print(error, file=log)
            return Outcome(REFUSED if step.is_tool else FAILED, 0.0, f"{command[0]}: {error.strerror}", [])
        stopped: list[bool] = []
        timer = Timer(limit_s, _stop, (process, stopped))
        timer.start()
        try:
            lines = _copy(process, log)
            code = process.wait()
        except BaseException:
            _kill(process)
            raise
        finally:
            timer.cancel()
        seconds = monotonic() - start
        print(f"[{step.name}: exit code {code} after {seconds:.0f} s]", file=log)
    if stopped:
        return Outcome(STOPPED, seconds, f"stopped at its limit of {limit_s:.0f} s; what it had written is kept", lines)
    if code == 0:
        return Outcome(OK, seconds, "", lines)
    if step.is_tool and (said := next((line for line in lines if REFUSALS.search(line)), None)):
        return Outcome(REFUSED, seconds, said.strip("= \n"), lines)
    return Outcome(FAILED, seconds, f"exit code {code}: {_reason(lines)}", lines)


def _copy(process: subprocess.Popen, log) -> list[str]:
    lines = []
    for line in process.stdout:
        log.write(line)
        print(line, end="", flush=True)
        lines.append(line.rstrip("\n"))
    return lines


def _stop(process: subprocess.Popen, stopped: list[bool]) -> None:
    if process.poll() is None:
        stopped.append(True)
        _kill(process)


def _kill(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _reason(lines: Sequence[str]) -> str:
    """The exception that ended it, behind whose message torch writes advice; where there was none, what was printed last."""
    said = [line.strip() for line in lines if line.strip()]
    raised = [line for line in said if EXCEPTION.match(line)]
    is_uncaught = any(line.startswith("Traceback (most recent call last)") for line in said)
    return (raised[-1] if raised and is_uncaught else said[-1] if said else "it printed nothing")[:300]
