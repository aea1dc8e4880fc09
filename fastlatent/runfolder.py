"""The folder of a run: where it is, whether it goes on from a checkpoint, and everything written into it.

    runs/<recipe>-<n>/   config.yaml  manifest.json  metrics.jsonl  samples.jsonl  checkpoints/  figures/  report.html

A folder belongs to one process at a time. A resumed run takes its logs back to where they were when the checkpoint was
saved, so that they end up as if nothing had happened.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from torch import Tensor

from fastlatent import checkpoint, manifest
from fastlatent.checkpoint import Checkpoint
from fastlatent.errors import UserError
from fastlatent.log import MetricsLog, StepLog

IGNORED = ("out", "resume", "log", "profile")
"""Sections of the configuration in which a resumed run may differ."""

UNFINISHED = {".lock", "manifest.json", ".manifest.json.tmp", ".config.yaml.tmp"}
"""What a process leaves that was killed before its run had a config.yaml."""

BEGINNING = UNFINISHED | {"config.yaml", "metrics.jsonl", "samples.jsonl"}
"""All that there is of a run before its first step."""


class RunFolder:
    """An open run folder. `resumed` is the verified checkpoint to go on from; None for a run that starts at step 0.

    As a context manager it is closed in the end, and gone where an exception ends a new run that has written nothing yet.
    """

    def __init__(self, path: Path, lock: int, keep: int, resumed: Checkpoint | None, is_new: bool = False):
        self.path, self.resumed, self._lock, self._keep, self._is_new = path, resumed, lock, keep, is_new
        self._metrics, self._samples = MetricsLog(path), StepLog(path / "samples.jsonl")
        place = resumed.state["logs"] if resumed else {"metrics": 0, "samples": 0}
        self._metrics.truncate(place["metrics"])
        self._samples.truncate(place["samples"])

    @classmethod
    def open(cls, config: Mapping[str, Any], argv: Sequence[str], fingerprint: str,
             backends: Mapping[str, str] | None = None, cwd: Path = Path("."),
             model: Mapping[str, str] | None = None) -> RunFolder:
        """Start a run, or with `resume` in the configuration go on with one; UserError where neither is possible.

        Args:
            config: the resolved configuration as plain values, with `recipe`, `out` and `resume`.
            fingerprint: of the data; a run does not go on with other data.
            backends: which implementation each op uses, for the manifest.
            cwd: where `runs/` is.
            model: a digest of each of the model's files, for the manifest; a run does not go on with another model.
        """
        config = _plain(config)
        path, keep = _resumable(config, Path(cwd)) if config["resume"] else None, config["checkpoint"]["keep"]
        try:
            if path is None:
                path, lock = _create(config, Path(cwd))
                _fill(path, config, argv, fingerprint, backends or {}, model or {})
                return cls(path, lock, keep, None, is_new=True)
            lock = _take(path)
            try:
                return cls(path, lock, keep, _reopen(path, argv, fingerprint, backends or {}, model or {}))
            except UserError:
                os.close(lock)
                raise
        except OSError as error:
            raise UserError(f"out: cannot use {error.filename or path}: {error.strerror}") from None

    @staticmethod
    def engine_to_resume(config: Mapping[str, Any], cwd: Path = Path(".")) -> dict[str, Any]:
        """The `engine` section of the run that `open` would go on with; UserError where there is none."""
        return read_config(_resumable(_plain(config), Path(cwd)))["engine"]

    def log(self, metrics: Mapping[str, float], samples: Sequence[dict] = ()) -> None:
        """Append a line to metrics.jsonl and the rows to samples.jsonl."""
        with self.writing():
            self._metrics.append(dict(metrics))
            self._samples.append(*samples)

    def save(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any],
             protect: Collection[int] = ()) -> Path:
        """Publish a checkpoint that also remembers how far the logs are; `protect` holds steps to keep besides."""
        with self.writing():
            self._metrics.sync()
            self._samples.sync()
            place = {"metrics": self._metrics.position(), "samples": self._samples.position()}
            return checkpoint.save(self.path, step, tensors, state | {"logs": place}, self._keep, protect)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """UserError where the folder takes nothing more: a full disk, a quota, a network drive that went away."""
        try:
            yield
        except (OSError, SafetensorError) as error:  # safetensors tells of a full disk by an error of its own
            newest = next(reversed(checkpoint.find(self.path)), None)
            there = "no checkpoint is there" if newest is None else f"step {newest} is there"
            raise UserError(f"{self.path}: cannot be written any more ({getattr(error, 'strerror', None) or error}); {there}; "
                            f"when it can, {self.how_to_go_on}") from error

    @property
    def how_to_go_on(self) -> str:
        """`go on with` the words after python -m fastlatent.train that resume this run, however it was started."""
        return f"go on with {self.path / 'config.yaml'} out={self.path} resume=auto"

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        is_empty = not self._metrics.position() and not checkpoint.find(self.path)
        self.close()
        if kind is not None and self._is_new and is_empty:
            for name in BEGINNING:
                (self.path / name).unlink(missing_ok=True)
            with suppress(OSError):  # somebody else put something there
                self.path.rmdir()

    def close(self) -> None:
        self._metrics.close()
        self._samples.close()
        os.close(self._lock)


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration of a run folder; UserError where there is none."""
    path = Path(folder) / "config.yaml"
    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: not a readable configuration of a run ({str(error).splitlines()[0]})") from None
    if not isinstance(config, dict) or "recipe" not in config:
        raise UserError(f"{path}: not the configuration of a run")
    return config


def first_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """`key (mine here, theirs there)` for the first key in which two configurations differ; None where they agree.

    Where ours leaves the choice of the engine open (engine.name=auto), theirs is as good as any.
    """
    mine, other = dict(leaves(ours)), dict(leaves(theirs))
    if mine.get("engine.name") == "auto":
        mine |= {k: v for k, v in other.items() if k == "engine.name" or (k.startswith("engine.") and k not in mine)}
    for key in [*mine, *(key for key in other if key not in mine)]:
        if key.partition(".")[0] not in IGNORED and mine.get(key, "nothing") != other.get(key, "nothing"):
            return f"{key} ({mine.get(key, 'nothing')} here, {other.get(key, 'nothing')} there)"
    return None


# ---- what is in it ------------------------------------------------------------------------------------------------


def _fill(path: Path, config: Mapping[str, Any], argv: Sequence[str], fingerprint: str, backends: Mapping[str, str],
          model: Mapping[str, str]) -> None:
    """Manifest, then configuration: a folder without a config.yaml was left by a process that was killed here."""
    manifest.create(path, config, argv, fingerprint, backends, model)
    temporary = path / ".config.yaml.tmp"
    temporary.write_text(_yaml(config), encoding="utf-8")
    temporary.replace(path / "config.yaml")


def _reopen(path: Path, argv: Sequence[str], fingerprint: str, backends: Mapping[str, str],
            model: Mapping[str, str]) -> Checkpoint | None:
    """The newest checkpoint of a run that goes on; None where it never came to save one."""
    manifest.resume(path, argv, fingerprint, backends, model)
    checkpoint.sweep(path)
    newest = checkpoint.latest(path)
    return checkpoint.load(newest) if newest else None


# ---- which folder -------------------------------------------------------------------------------------------------


def _resumable(config: Mapping[str, Any], cwd: Path) -> Path:
    """The folder that `resume` means."""
    if config["out"]:
        path = _chosen(config, cwd)
        if not (path / "config.yaml").is_file():
            raise UserError(f"resume: {path} holds no run to go on with")
        if difference := first_difference(config, read_config(path)):
            raise UserError(f"resume: the run in {path} has another configuration: {difference}")
        return path
    runs = [path for _, path in reversed(_numbered(config["recipe"], cwd)) if (path / "config.yaml").is_file()]
    differences = {path: first_difference(config, read_config(path)) for path in runs}
    for path, difference in differences.items():
        if difference is None:
            return path
    wanted = f"resume: no {cwd / 'runs' / config['recipe']}-* has this configuration"
    raise UserError(f"{wanted}; the newest, {runs[0]}, differs in {differences[runs[0]]}" if runs else wanted)


def _chosen(config: Mapping[str, Any], cwd: Path) -> Path:
    """The folder that `out` names; no shell has expanded its `~` in a file, and not every one does in `out=~/run`."""
    return cwd / os.path.expanduser(config["out"])


def _create(config: Mapping[str, Any], cwd: Path) -> tuple[Path, int]:
    """An empty folder of our own and its lock."""
    if config["out"]:
        path = _chosen(config, cwd)
        if path.exists() and not path.is_dir():
            raise UserError(f"out: {path} is a file, wanted a folder")
        if path.exists() and {entry.name for entry in path.iterdir()} - UNFINISHED:
            raise UserError(f"out: {path} is not empty; go on with its run by resume=auto, or choose another folder")
        path.mkdir(parents=True, exist_ok=True)
        return path, _take(path)
    runs = cwd / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    number = max((n for n, _ in _numbered(config["recipe"], cwd)), default=0)
    while True:
        number += 1
        path = runs / f"{config['recipe']}-{number}"
        try:
            path.mkdir()
        except FileExistsError:  # another process was faster
            continue
        return path, _take(path)


def _numbered(recipe: str, cwd: Path) -> list[tuple[int, Path]]:
    """runs/<recipe>-<n>, by n."""
    pattern = re.compile(re.escape(recipe) + r"-(\d+)")
    entries = (cwd / "runs").glob("*")
    return sorted((int(match[1]), path) for path in entries if (match := pattern.fullmatch(path.name)))


def _take(path: Path) -> int:
    """The folder's lock, held until it is closed or the process ends."""
    lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(f"out: another process is writing the run in {path}") from None
    return lock


# ---- configurations -----------------------------------------------------------------------------------------------


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as config.yaml gives it back."""
    return OmegaConf.to_container(OmegaConf.create(_yaml(config)))


def _yaml(config: Mapping[str, Any]) -> str:
    # OmegaConf quotes what its own reader would take for a number
    return OmegaConf.to_yaml(OmegaConf.create(dict(config)))


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a tree with its dotted key; lists are values, except lists of sections."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from leaves(item, f"{prefix}.{index}")
    else:
        yield prefix, value
