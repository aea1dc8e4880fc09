"""Inputs for the tests and the benchmark of gaussian_reparam."""

from __future__ import annotations

import torch

TEST_SHAPES = [{"T": 1, "D": 1}, {"T": 7, "D": 65, "source": "eps"}, {"T": 37, "D": 130, "free_bits": 0.5},
               {"T": 9, "D": 600, "source": "z", "free_bits": 0.1}]
BENCH_SHAPES = [{"T": t, "D": d} for t in (64, 4096, 32768) for d in (256, 1536)]


def make_inputs(shape: dict[str, int], *, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, object]:
    T, D = shape["T"], shape["D"]
    g = torch.Generator().manual_seed(seed)
    mean_TD, logvar_TD, eps_TD = (torch.randn(T, D, generator=g) for _ in range(3))
    logvar_TD = 1.5 * logvar_TD - 1
    inputs = {"mean_TD": mean_TD.to(dtype), "logvar_TD": logvar_TD.to(dtype)}
    source = shape.get("source", "noise")
    if source == "eps":
        inputs["eps_TD"] = eps_TD.to(dtype)
    elif source == "z":
        inputs["z_TD"] = (mean_TD + torch.exp(logvar_TD / 2) * eps_TD).to(dtype)
    else:
        inputs |= {"seed": torch.tensor(5 + 2**35), "counter_T3": torch.randint(2**16, (T, 3), generator=g)}
    return {name: value.to(device) for name, value in inputs.items()} | {"free_bits": shape.get("free_bits", 0.0)}


def bytes_moved(shape: dict[str, int], dtype: torch.dtype) -> int:
    """Least traffic of a forward pass that draws its noise: mean and log-variance in, z and three numbers a row out."""
    return shape["T"] * (3 * shape["D"] * dtype.itemsize + 3 * 4)
