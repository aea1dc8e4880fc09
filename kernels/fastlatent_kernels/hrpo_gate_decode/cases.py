"""Inputs for the tests and the benchmark of hrpo_gate_decode."""

from __future__ import annotations

import torch

TEST_SHAPES = [{"B": 1, "D": 1, "V": 1}, {"B": 7, "D": 65, "V": 131}, {"B": 37, "D": 96, "V": 300},
               {"B": 5, "D": 32, "V": 50, "latent_percent": 0}, {"B": 5, "D": 32, "V": 50, "latent_percent": 100}]
BENCH_SHAPES = [{"B": b, "D": d, "V": v} for d, v in ((576, 49152), (1536, 151936)) for b in (1, 16, 64, 256)]


def make_inputs(shape: dict[str, int], *, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, object]:
    B, D, V = shape["B"], shape["D"], shape["V"]
    g = torch.Generator().manual_seed(seed)
    new = lambda *size: torch.randn(*size, generator=g)
    latent_share = shape.get("latent_percent", 70) / 100
    inputs = {"token_ids_B": torch.randint(V, (B,), generator=g), "mixture_BD": new(B, D).to(dtype),
              "table_VD": new(V, D).to(dtype), "weight_2DD": (new(2 * D, D) / D**0.5).to(dtype), "bias_2D": new(2 * D),
              "lambda_D": 4 + 3 * new(D), "latent_B": torch.rand(B, generator=g) < latent_share,
              "out_BD": torch.full((B, D), torch.nan, dtype=dtype)}
    return {name: value.to(device) for name, value in inputs.items()}


def bytes_moved(shape: dict[str, int], dtype: torch.dtype) -> int:
    """Least traffic: the gate matrices once, a table row and a mixture in and an input out per row."""
    return (2 * shape["D"] + 3 * shape["B"]) * shape["D"] * dtype.itemsize


def flops(shape: dict[str, int]) -> int:
    """Of the product with the two gate matrices."""
    return 4 * shape["B"] * shape["D"] ** 2
