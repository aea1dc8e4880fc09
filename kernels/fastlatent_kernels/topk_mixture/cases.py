"""Inputs for the tests and the benchmark of topk_mixture."""

from __future__ import annotations

import torch

TEST_SHAPES = [{"B": 1, "V": 1, "K": 1}, {"B": 3, "V": 131, "K": 64}, {"B": 9, "V": 1000, "K": 50, "top_p": 0.9},
               {"B": 8, "V": 1024, "K": 7, "greedy": 1}, {"B": 3, "V": 49152, "K": 50},
               {"B": 33, "V": 1000, "K": 50, "top_p": 0.9, "interpret": 0},
               {"B": 32, "V": 1024, "K": 7, "greedy": 1, "interpret": 0}]
BENCH_SHAPES = [{"B": b, "V": 49152, "K": 50} for b in (1, 16, 64)]


def make_inputs(shape: dict[str, int], *, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, object]:
    B, V = shape["B"], shape["V"]
    g = torch.Generator().manual_seed(seed)
    logits_BV = (3 * torch.randn(B, V, generator=g)).to(dtype)  # in bfloat16 many are equal
    logits_BV[:, V // 2:V // 2 + 9] = -torch.inf if V > 100 else 0.0  # forbidden tokens
    return {"logits_BV": logits_BV.to(device), "temperature": 0.7, "top_k": shape["K"],
            "top_p": shape.get("top_p", 1.0), "seed": torch.tensor(5 + 2**35, device=device),
            "counter_B3": torch.randint(2**16, (B, 3), generator=g).to(device), "greedy": bool(shape.get("greedy"))}


def bytes_moved(shape: dict[str, int], dtype: torch.dtype) -> int:
    """Least traffic: the logits once."""
    return shape["B"] * (shape["V"] * dtype.itemsize + shape["K"] * 12)
