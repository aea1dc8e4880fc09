"""Inputs for the tests and the benchmark of token_logprob."""

from __future__ import annotations

import torch

TEST_SHAPES = [{"A": 1, "D": 1, "V": 2}, {"A": 7, "D": 65, "V": 131}, {"A": 70, "D": 32, "V": 300},
               {"A": 200, "D": 32, "V": 300, "interpret": 0}, {"A": 66, "D": 20, "V": 130, "temperatures": 2}]
BENCH_SHAPES = [{"A": a, "D": 576, "V": 49152} for a in (256, 2048)]


def make_inputs(shape: dict[str, int], *, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, object]:
    A, D, V = shape["A"], shape["D"], shape["V"]
    g = torch.Generator().manual_seed(seed)
    inputs = {"hidden_AD": torch.randn(A, D, generator=g).to(dtype),
              "weight_VD": 2 * torch.randn(V, D, generator=g) / D**0.5,
              "target_A": torch.randint(V, (A,), generator=g), "temperature": 0.8}
    if shape.get("temperatures", 1) == 2:  # as where latent rows are scored at 1 and the others as they were drawn
        inputs["temperature"] = torch.where(torch.rand(A, generator=g) < 0.5, 1.0, 0.6)
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def bytes_moved(shape: dict[str, int], dtype: torch.dtype) -> int:
    """Least traffic of a forward pass: weights and hidden states once."""
    return (shape["V"] + shape["A"]) * shape["D"] * dtype.itemsize + 16 * shape["A"]


def flops(shape: dict[str, int]) -> int:
    """The GEMM of a forward pass."""
    return 2 * shape["A"] * shape["D"] * shape["V"]
