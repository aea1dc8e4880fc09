"""Inputs for the tests and the benchmark of soft_embedding."""

from __future__ import annotations

import torch

TEST_SHAPES = [{"N": 1, "K": 1, "V": 1, "D": 1}, {"N": 7, "K": 5, "V": 33, "D": 65},
               {"N": 600, "K": 8, "V": 50, "D": 32}]
BENCH_SHAPES = [{"N": n, "K": 50, "V": 49152, "D": 576} for n in (64, 4096)]


def make_inputs(shape: dict[str, int], *, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, object]:
    g = torch.Generator().manual_seed(seed)
    p_NK = torch.randn(shape["N"], shape["K"], generator=g).softmax(dim=1)
    inputs = {"ids_NK": torch.randint(shape["V"], p_NK.shape, generator=g),
              "weight_NK": p_NK / p_NK.norm(dim=1, keepdim=True),
              "table_VD": torch.randn(shape["V"], shape["D"], generator=g).to(dtype)}
    return {name: value.to(device) for name, value in inputs.items()}


def bytes_moved(shape: dict[str, int], dtype: torch.dtype) -> int:
    """Least traffic of a forward pass: ids, weights and the rows they name in, the sums out."""
    N, K, D = shape["N"], shape["K"], shape["D"]
    return N * K * (8 + 4 + D * dtype.itemsize) + N * D * dtype.itemsize
