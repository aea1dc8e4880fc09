"""Checkpoints: safetensors and JSON, published whole or not at all, verified before they are believed.

    <run>/checkpoints/step-000020/{<group>.safetensors, state.json, COMPLETE}

A checkpoint is written to `checkpoints/.tmp-*`, synced to disk, marked with COMPLETE (format, step, size and SHA-256
of every file) and renamed into place, so that a kill or a power failure at any instant leaves the last one standing.
Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastlatent.errors import UserError

FORMAT = "fastlatent-checkpoint-1"
MARKER = "COMPLETE"


@dataclass(slots=True)
class Checkpoint:
    """What a run needs to go on from the end of `step`."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]  # by group, then by name; on the CPU
    state: dict[str, Any]  # the JSON part


def save(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int = 1,
         protect: Collection[int] = ()) -> Path:
    """Publish `<folder>/checkpoints/step-<step>`, then drop all but the newest `keep` and the steps in `protect`.

    `tensors` holds groups of named tensors, one file each; `state` is JSON. A checkpoint of the same step is replaced.
    """
    root = Path(folder) / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    _sync(root.parent)
    temporary = Path(mkdtemp(prefix=".tmp-", dir=root))
    try:
        _write(temporary, step, tensors, state)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk it would be in the way of going on
        raise
    path = _publish(temporary, step)
    _prune(root, keep, protect)
    return path


def load(path: Path) -> Checkpoint:
    """Read a checkpoint after verifying every byte of it; UserError that names the file and what is wrong with it."""
    path = Path(path)
    step, files = _marker(path)
    for name, wanted in files.items():
        file = path / name
        if not file.is_file():
            raise UserError(f"{file}: missing, although the checkpoint's {MARKER} lists it")
        if (size := file.stat().st_size) != wanted["size"]:
            raise UserError(f"{file}: has {size} bytes, wanted {wanted['size']}: it is truncated or was replaced")
        if _sha256(file) != wanted["sha256"]:
            raise UserError(f"{file}: its SHA-256 is not the one in {MARKER}: the file is corrupt")
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path / 'state.json'}: not a readable JSON file ({error})") from None
    tensors = {Path(name).stem: _tensors(path / name) for name in files if name.endswith(".safetensors")}
    return Checkpoint(path, step, tensors, state)


def find(folder: Path) -> dict[int, Path]:
    """The published checkpoints of a run folder by step, oldest first."""
    found = {int(match[1]): path for path in (Path(folder) / "checkpoints").glob("step-*")
             if (match := re.fullmatch(r"step-(\d+)", path.name)) and (path / MARKER).is_file()}
    return dict(sorted(found.items()))


def latest(folder: Path) -> Path | None:
    """The newest published checkpoint of a run folder."""
    return next(reversed(find(folder).values()), None)


def sweep(folder: Path) -> None:
    """Tidy up after a killed process: publish what it had finished writing, delete what it had not.

    Only for the process that writes the run, before its first save.
    """
    root = Path(folder) / "checkpoints"
    for path in root.glob(".tmp-*"):
        try:
            step, _ = _marker(path)
        except UserError:
            shutil.rmtree(path)
            continue
        if step in find(folder):
            shutil.rmtree(path)
        else:
            _publish(path, step)
    for path in root.glob(".old-*"):
        shutil.rmtree(path)


# ---- optimizer state ----------------------------------------------------------------------------------------------


def optimizer_tensors(optimizer: torch.optim.Optimizer,
                      names: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors called `<name>/<key>`, and as JSON; `names` are in the order of its groups.

    Hyper-parameters such as the learning rate are not part of it; they follow from the configuration and the schedule.
    """
    tensors, values = {}, {}
    for name, (parameter, _) in zip(names, _parameters(optimizer), strict=True):
        for key, value in optimizer.state.get(parameter, {}).items():
            (tensors if isinstance(value, Tensor) else values)[f"{name}/{key}"] = value
    return tensors, {"optimizer": type(optimizer).__name__, "values": values}


def load_optimizer(optimizer: torch.optim.Optimizer, names: Iterable[str], tensors: dict[str, Tensor],
                   state: dict[str, Any]) -> None:
    """Put back what `optimizer_tensors` took, bit for bit; UserError where it fits another optimizer or model."""
    if state["optimizer"] != type(optimizer).__name__:
        raise UserError(f"checkpoint: holds the state of {state['optimizer']}, wanted {type(optimizer).__name__}")
    by_name = dict(zip(names, _parameters(optimizer), strict=True))
    optimizer.state.clear()
    for path, value in (tensors | state["values"]).items():
        name, _, key = path.rpartition("/")
        if name not in by_name:
            raise UserError(f"checkpoint: holds optimizer state of {name!r}, which is not trained in this model")
        parameter, group = by_name[name]
        if isinstance(value, Tensor):
            if value.dim() and value.shape != parameter.shape:
                raise UserError(f"checkpoint: {path} has shape {list(value.shape)}, wanted {list(parameter.shape)}")
            # a step count stays on the CPU unless a kernel reads it
            is_host = key == "step" and not (group.get("fused") or group.get("capturable"))
            value = value.to("cpu" if is_host else parameter.device, copy=True)
        optimizer.state[parameter][key] = value


def _parameters(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, dict]]:
    """Every parameter with its group."""
    return [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]


# ---- files --------------------------------------------------------------------------------------------------------


def _write(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Fill `folder` with a checkpoint and wait until it is on the disk; the marker comes last."""
    folder.chmod(0o755)  # mkdtemp makes private folders
    with ThreadPoolExecutor(max_workers=2) as pool:
        digests = {}
        for group, named in tensors.items():
            path = folder / f"{group}.safetensors"
            save_file({name: tensor.detach().contiguous() for name, tensor in named.items()}, path, {"format": "pt"})
            # hashing and syncing release the GIL: they overlap each other and the writing of the next group
            digests[path.name] = pool.submit(_sha256, path), pool.submit(_sync, path)
        path = folder / "state.json"
        path.write_text(json.dumps(state))
        digests[path.name] = pool.submit(_sha256, path), pool.submit(_sync, path)
        files = {name: {"sha256": digest.result(), "size": (folder / name).stat().st_size}
                 for name, (digest, synced) in digests.items() if synced.result() is None}
    marker = folder / MARKER
    marker.write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1))
    _sync(marker)
    _sync(folder)


def _marker(path: Path) -> tuple[int, dict[str, dict]]:
    """Step and files of a checkpoint, by its COMPLETE."""
    file = path / MARKER
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint folder")
    if not file.is_file():
        raise UserError(f"{file}: missing: this is no fastlatent checkpoint, or one that was never finished")
    try:
        marker = json.loads(file.read_bytes())
        if marker["format"] != FORMAT:
            raise UserError(f"{file}: format is {marker['format']!r}, this version reads {FORMAT!r}")
        step, files = int(marker["step"]), dict(marker["files"])
        is_plain = all(Path(name).name == name and {"sha256", "size"} <= set(entry) for name, entry in files.items())
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: not the marker of a fastlatent checkpoint") from None
    if not is_plain or "state.json" not in files:
        raise UserError(f"{file}: its list of files is not that of a fastlatent checkpoint")
    return step, files


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a readable safetensors file ({error})") from None


def _publish(temporary: Path, step: int) -> Path:
    """Rename a finished folder into place; killed between the two renames, it is published by `sweep`."""
    path = temporary.parent / f"step-{step:06d}"
    replaced = None
    if path.exists():
        replaced = path.rename(temporary.with_name(f"{temporary.name}-replaced"))
    temporary.rename(path)
    _sync(path.parent)
    if replaced is not None:
        shutil.rmtree(replaced)
    return path


def _prune(root: Path, keep: int, protect: Collection[int]) -> None:
    found = find(root.parent)
    for step in list(found)[: -max(keep, 1)]:
        if step not in protect:
            # renamed first: a half-deleted folder must not look published
            shutil.rmtree(found[step].rename(root / f".old-{step:06d}"))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
