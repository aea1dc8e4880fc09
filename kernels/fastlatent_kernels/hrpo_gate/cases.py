"""Inputs for the tests and the benchmark of hrpo_gate."""

from __future__ import annotations

import torch

TEST_SHAPES = [{"T": 1, "D": 1}, {"T": 7, "D": 65}, {"T": 128, "D": 96}, {"T": 37, "D": 200},
               {"T": 5, "D": 32, "latent_percent": 0}, {"T": 5, "D": 32, "latent_percent": 100}]
BENCH_SHAPES = [{"T": t, "D": d} for t in (64, 4096, 32768) for d in (576, 1536)]


def make_inputs(shape: dict[str, int], *, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, object]:
    T, D = shape["T"], shape["D"]
    g = torch.Generator().manual_seed(seed)
    new = lambda *size: torch.randn(*size, generator=g)
    latent_share = shape.get("latent_percent", 70) / 100
    inputs = {"u_T2D": new(T, 2 * D).to(dtype), "token_TD": new(T, D).to(dtype), "mixture_TD": new(T, D).to(dtype),
              "bias_2D": new(2 * D), "lambda_D": 4 + 3 * new(D), "latent_T": torch.rand(T, generator=g) < latent_share}
    return {name: value.to(device) for name, value in inputs.items()}


def bytes_moved(shape: dict[str, int], dtype: torch.dtype) -> int:
    """Least traffic of a forward pass: u, token and mixture in, the embedding out."""
    return 5 * shape["T"] * shape["D"] * dtype.itemsize + shape["T"]
