"""Reward functions in processes that can be killed: whatever a function does, the run goes on.

A hang, a crash, an exception, a memory bomb or a return value that is no number costs one reward, which is counted as
missing. The worker it happened in is replaced; the rest of its completion and all others are scored as if nothing was.
"""

from __future__ import annotations

import math
import os
import selectors
import subprocess
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlatent.errors import UserError
from fastlatent.rewards.base import RewardConfig, RewardJob, RewardReport, RewardResult, unique_names
from fastlatent.rewards.process import WorkerProcess
from fastlatent.rewards.wire import job_message, setup_message

_START_TIMEOUT_S = 120.0  # importing a heavy module on a busy machine takes its time
_MAX_FAILED_STARTS = 3
_MAX_ERRORS = 5
_MAX_WORKERS = 8


@dataclass(slots=True)
class _Task:
    """What is left to do for one completion: the rewards from `reward` on."""

    job: int
    reward: int


class RewardPool:
    """Scores completions with the configured rewards. One thread at a time; use it as a context manager.

    Workers live until `close`. On Linux they belong to the thread that started them and die with it.
    """

    def __init__(self, configs: Sequence[RewardConfig], num_workers: int | None = None, memory_mb: int = 2048,
                 columns: Collection[str] | None = None, log_path: Path | str | None = None):
        """Start the workers, and return when the first one has imported every reward function.

        Args:
            num_workers: processes; by default one per core this process may use, at most 8.
            memory_mb: what a worker may allocate beyond its imports (Linux only).
            columns: the data's column names where known; a function that wants another is then refused here.
            log_path: file to append what user functions print; by default it is dropped.

        Raises:
            UserError: a reward does not exist, cannot be imported, or cannot be called with what it will be given.
        """
        self.configs = list(configs)
        self.names = unique_names(self.configs)
        self._setup = setup_message(self.configs, columns, memory_mb)
        self._num_workers = num_workers or min(_MAX_WORKERS, _num_cores())
        self._output = subprocess.DEVNULL if log_path is None else os.open(
            log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._selector = selectors.DefaultSelector()
        self._workers: list[WorkerProcess] = []
        self._failed_starts = 0
        self._start_error = ""
        self._begin([])
        try:
            self._fill()
            while not self._failed_starts and not any(worker.is_ready for worker in self._workers):
                self._step()
            if self._failed_starts:
                raise UserError(self._start_error)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; may be called twice."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()
        self._selector.close()
        if self._output >= 0:
            os.close(self._output)
            self._output = subprocess.DEVNULL

    def score(self, jobs: Sequence[RewardJob]) -> tuple[list[RewardResult], RewardReport]:
        """Score `jobs`, and say what went wrong on the way.

        Returns:
            one result per job in order, and the counts of this call.

        Raises:
            UserError: workers do not start any more, as when a reward's source file was broken while we ran.
        """
        self._begin(jobs)
        self._failed_starts = 0
        try:
            while self._step(wait=False):  # workers that died, or got ready, since the last call
                pass
            while self._num_left:
                self._fill()
                for worker in self._workers:
                    if self._pending and worker.is_ready and worker.task is None:
                        self._give(worker, self._pending.popleft())
                self._step()
        finally:
            # only after an exception (Ctrl-C): an answer that comes later must not be taken for one of the next call
            for worker in [w for w in self._workers if w.task is not None]:
                self._drop(worker)
        return [self._result(values) for values in self._values], self.report

    def _begin(self, jobs: Sequence[RewardJob]) -> None:
        self.report = RewardReport()
        self._jobs = jobs
        self._values: list[list[float | None]] = [[None] * len(self.names) for _ in jobs]
        self._pending = deque(_Task(job, 0) for job in range(len(jobs)))
        self._num_left = len(jobs)

    def _result(self, values: list[float | None]) -> RewardResult:
        total = sum((config.weight * (math.nan if value is None else value)
                     for config, value in zip(self.configs, values, strict=True) if config.weight != 0), 0.0)
        return RewardResult(dict(zip(self.names, values, strict=True)), total)

    # Workers: starting, giving, hearing, dropping

    def _fill(self) -> None:
        """Start workers until there are as many as wanted; give up when starting keeps failing."""
        while len(self._workers) < self._num_workers and self._failed_starts < _MAX_FAILED_STARTS:
            try:
                worker = WorkerProcess(self._setup, self._output)
            except OSError as error:  # no memory or process ids left: go on with the workers there are
                self._start_failed(f"rewards: a worker cannot be started: {error}")
                continue
            worker.deadline_s = time.monotonic() + _START_TIMEOUT_S
            self._workers.append(worker)
            self._selector.register(worker.socket, _events(worker), worker)
        if not self._workers:
            raise UserError(self._start_error)

    def _give(self, worker: WorkerProcess, task: _Task) -> None:
        worker.task = task
        worker.deadline_s = time.monotonic() + self.configs[task.reward].timeout_s
        worker.send(job_message(self._jobs[task.job], start=task.reward))
        self._selector.modify(worker.socket, _events(worker), worker)

    def _step(self, wait: bool = True) -> bool:
        """Wait until a worker answers, dies or runs out of time, and deal with it; False where none had answered."""
        busy = [worker for worker in self._workers if worker.task is not None or not worker.is_ready]
        first_s = min((worker.deadline_s for worker in busy), default=0.0)
        events = self._selector.select(max(0.0, first_s - time.monotonic()) if wait else 0.0)
        woken_s = time.monotonic()  # before the answers are read: who has answered is not late
        for key, mask in events:
            worker: WorkerProcess = key.data
            if mask & selectors.EVENT_WRITE:
                worker.flush()
                self._selector.modify(worker.socket, _events(worker), worker)
            if mask & selectors.EVENT_READ:
                self._hear(worker)
        for worker in busy:
            if worker in self._workers and (worker.task or not worker.is_ready) and worker.deadline_s <= woken_s:
                self._late(worker)
        return bool(events)

    def _hear(self, worker: WorkerProcess) -> None:
        try:
            messages = worker.receive()
        except EOFError:
            task, was_ready, reason = worker.task, worker.is_ready, self._drop(worker)
            if not was_ready:
                self._start_failed(f"rewards: a worker died while importing the reward functions ({reason})")
            elif task is not None:
                self._missing(task, "num_crashes", f"the worker died ({reason})")
            return
        for message in messages:
            if "error" in message:
                self._drop(worker)
                return self._start_failed(message["error"])
            if "ready" in message:
                worker.is_ready = True
                self._failed_starts = 0
            elif not self._answered(worker, message):
                return

    def _answered(self, worker: WorkerProcess, message: dict[str, Any]) -> bool:
        """Take one reward from `worker`; False where the worker had to go."""
        task: _Task | None = worker.task
        if task is None or message.get("index") != task.reward:  # user code got hold of the socket
            self._drop(worker)
            if task is not None:
                self._missing(task, "num_crashes", "the worker gave an answer nobody asked for")
            return False
        if "missing" in message:
            if message["missing"] == "num_memory_errors":  # what it had allocated may never be given back
                self._drop(worker)
                self._missing(task, message["missing"], message["message"])
                return False
            self._count(task.reward, message["missing"], message["message"])
        else:
            self._values[task.job][task.reward] = message["value"]
        task.reward += 1
        if task.reward == len(self.names):
            worker.task = None
            self._num_left -= 1
        else:
            worker.deadline_s = time.monotonic() + self.configs[task.reward].timeout_s
        return True

    def _late(self, worker: WorkerProcess) -> None:
        task = worker.task
        self._drop(worker)
        if task is None:
            self._start_failed(f"rewards: importing the reward functions took more than {_START_TIMEOUT_S:.0f} s")
        else:
            self._missing(task, "num_timeouts", f"took more than {self.configs[task.reward].timeout_s:g} s")

    def _drop(self, worker: WorkerProcess) -> str:
        """Kill `worker` and forget it; returns how it ended."""
        self._workers.remove(worker)
        self._selector.unregister(worker.socket)
        return worker.kill()

    def _start_failed(self, reason: str) -> None:
        self._failed_starts += 1
        self._start_error = reason

    def _missing(self, task: _Task, counter: str, reason: str) -> None:
        """Count the reward `task` was at, whose worker is gone, and queue the rest of the completion."""
        self._count(task.reward, counter, reason)
        if task.reward + 1 < len(self.names):
            self._pending.append(_Task(task.job, task.reward + 1))
        else:
            self._num_left -= 1

    def _count(self, reward: int, counter: str, reason: str) -> None:
        setattr(self.report, counter, getattr(self.report, counter) + 1)
        if counter != "num_none" and len(self.report.errors) < _MAX_ERRORS:
            self.report.errors.append(f"{self.names[reward]}: {reason}")


def _events(worker: WorkerProcess) -> int:
    return selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.has_unsent else 0)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
