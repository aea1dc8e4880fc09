"""What is installed here and what it makes of it: `python -m fastlatent.doctor`. Reads this machine only, never a network."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from shlex import quote
from typing import NamedTuple

import torch
from fastlatent_kernels.overview import Choice, choices
from transformers import LlamaConfig

from fastlatent import build, manifest
from fastlatent.cli import Parser, run_command
from fastlatent.models.smollm2 import SMOLLM2, cache_dir, find_damage
from fastlatent.policy import compute_dtype
from fastlatent.rollout.auto import AutoEngine
from fastlatent.schema import Config
from fastlatent.vllm_plugin import surface

Rows = list[tuple[str, str]]


class Extra(NamedTuple):
    """An optional dependency: what pip calls it, what Python imports, what needs it."""

    requirement: str
    module: str
    use: str


EXTRAS = {
    "math": Extra("math-verify", "math_verify", "the reward math_equal"),
    "data": Extra("datasets", "datasets", "data.name=hub"),
    "track": Extra("tensorboard", "tensorboard", "log.trackers=[tensorboard]"),
    "gpu": Extra("nvtx>=0.2.13", "nvtx", "named ranges in Nsight Systems"),
    "triton": Extra("triton", "triton", "kernels for a GPU"),
    "vllm": Extra("vllm==0.26.0", "vllm", "engine.name=vllm"),
}
"""By the name of the extra in pyproject.toml."""


def sections() -> dict[str, Rows]:
    """Everything there is to say, as labelled lines under headings."""
    return {"versions": _versions(), "machine": _machine(), "model": _model(), "ops": list(_ops()), "extras": _extras()}


def _versions() -> Rows:
    return [(name, version or "none") for name, version in manifest.versions().items()]


def _machine() -> Rows:
    hardware = manifest.hardware()
    features = {"avx512_bf16": torch.cpu._is_avx512_bf16_supported(), "amx": torch.cpu._is_amx_tile_supported()}
    rows = [
        ("platform", hardware["platform"]),
        ("cpu", f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gb']} GiB"),
        ("cpu features", ", ".join([torch.backends.cpu.get_cpu_capability().lower(),
                                    *(name if has else f"no {name}" for name, has in features.items())])),
        ("torch threads", str(torch.get_num_threads())),
    ]
    if not torch.cuda.is_available():
        return [*rows, ("gpu", "none that torch sees" if torch.version.cuda else "none: this torch is built without CUDA")]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        rows.append((f"gpu {index}", f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, "
                                    f"{gpu.total_memory / 2**30:.0f} GiB"))
    return rows


def _model() -> Rows:
    config = Config()
    device = build.device_of(config)
    dtype = compute_dtype(config.model, device)
    has = "has" if dtype == torch.bfloat16 else "lacks"
    reason = "the GPU's own" if device.type == "cuda" else f"this CPU {has} instructions for bfloat16"
    folder = cache_dir() / SMOLLM2.name
    damage = find_damage(folder, SMOLLM2)
    # SmolLM2, which need not be in the cache, is a Llama
    engine, why = AutoEngine.choose(AutoEngine.Config(), LlamaConfig(), device)
    state = {None: f"in {folder}", "": f"not fetched yet: {SMOLLM2.size_mb} MB at its first use, or with "
                                        "python -m fastlatent.models"}
    return [
        ("model.device=auto", str(device)),
        ("model.dtype=auto", f"{str(dtype).removeprefix('torch.')}: {reason}"),
        ("engine.name=auto", f"{engine.name}: {why}"),
        (SMOLLM2.name, state.get(damage, f"{folder} is not whole ({damage}); its next use fetches it again")),
    ]


def _ops() -> Iterator[tuple[str, str]]:
    """Each op on each device: the backend of each dtype, then why not the faster ones."""
    by_op: dict[tuple[str, str], list[Choice]] = {}
    for choice in choices():
        by_op.setdefault((choice.op, choice.device), []).append(choice)
    for (op, device), found in by_op.items():
        backends = {choice.backend for choice in found}
        yield f"{op} ({device})", (
            backends.pop() if len(backends) == 1 else ", ".join(f"{c.dtype}: {c.backend}" for c in found))
        refusals = {f"not {backend}: {reason}" for c in found for backend, reason in c.refusals.items()}
        yield from (("", line) for line in sorted(refusals))


def _extras() -> Rows:
    rows = []
    for name, extra in EXTRAS.items():
        is_there = importlib.util.find_spec(extra.module) is not None
        rows.append((name, f"{'installed' if is_there else 'missing'}: {extra.use}"
                     + ("" if is_there else f"; {_remedy(name, extra)}")))
    return rows + _vllm()


def _remedy(name: str, extra: Extra) -> str:
    if name == "vllm" and not torch.cuda.is_available():
        return surface.INSTALL["cpu"]
    return f"pip install {quote(extra.requirement)}"


def _vllm() -> Rows:
    """Which vLLM there is, and whether it has all we stand on in it."""
    if (found := surface.installed()) is None:
        return []
    device = build.device_of(Config())
    runner = surface.runner_of("auto", device)
    reason = surface.refusal(runner, device)
    return [("", reason or f"{' '.join(found)}, model runner {runner}: has every name that is overridden")]


def main(argv: list[str]) -> None:
    Parser(prog="python -m fastlatent.doctor", description=__doc__).parse_args(argv)
    for heading, rows in sections().items():
        width = max(len(label) for label, _ in rows)
        print("\n".join([heading, *(f"  {label:{width}}  {text}" for label, text in rows), ""]))


if __name__ == "__main__":
    run_command(main)
