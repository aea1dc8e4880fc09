"""Inputs for the tests and the benchmark of vocab_head."""

from __future__ import annotations

import torch

TEST_SHAPES = [{"B": 1, "D": 1, "V": 1}, {"B": 3, "D": 65, "V": 131, "mixture": 1}, {"B": 33, "D": 64, "V": 1000},
               {"B": 32, "D": 64, "V": 1024, "mixture": 1, "greedy": 1}, {"B": 5, "D": 16, "V": 2400, "mixture": 1},
               {"B": 5, "D": 16, "V": 49152, "mixture": 1, "interpret": 0},
               {"B": 6, "D": 896, "V": 900, "mixture": 1, "tied": 1, "interpret": 0}]
# tied, as small models are, and as the pass that reads the weights once wants them
BENCH_SHAPES = [{"B": b, "D": 576, "V": 49152, "mixture": m, "tied": m} for b in (1, 16, 64) for m in (0, 1)]


def make_inputs(shape: dict[str, int], *, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, object]:
    B, D, V = shape["B"], shape["D"], shape["V"]
    g = torch.Generator().manual_seed(seed)
    counter_B3 = torch.randint(2**16, (B, 3), generator=g)
    inputs = {"hidden_BD": torch.randn(B, D, generator=g).to(dtype),
              "weight_VD": (3 * torch.randn(V, D, generator=g) / D**0.5).to(dtype),
              "temperature": 0.7, "seed": torch.tensor(-3 - 2**40), "counter_B3": counter_B3,
              "greedy": bool(shape.get("greedy")), "embed_VD": None}
    if shape.get("mixture") and not shape.get("tied"):
        inputs["embed_VD"] = torch.randn(V, D, generator=g).to(dtype)
    inputs = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    return inputs | {"embed_VD": inputs["weight_VD"]} if shape.get("tied") else inputs


def bytes_moved(shape: dict[str, int], dtype: torch.dtype) -> int:
    """Least traffic: the weights once (tied, they are the input embedding too), hidden in, mixture out."""
    return (shape["V"] + 2 * shape["B"]) * shape["D"] * dtype.itemsize


def flops(shape: dict[str, int]) -> int:
    """The GEMM of the logits, and that of the mixture."""
    return 2 * shape["B"] * shape["D"] * shape["V"] * (1 + shape.get("mixture", 0))
