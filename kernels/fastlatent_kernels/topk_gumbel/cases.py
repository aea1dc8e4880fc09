"""Inputs for the tests and the benchmark of topk_gumbel."""

from __future__ import annotations

import torch

from fastlatent_kernels.topk_gumbel import ClippedGumbel

TEST_SHAPES = [{"B": 1, "V": 1, "K": 1}, {"B": 3, "V": 131, "K": 64}, {"B": 7, "V": 300, "K": 10, "top_p": 0.95},
               {"B": 4, "V": 1024, "K": 5, "top_p": 0.5, "two_sided": 1}, {"B": 3, "V": 9000, "K": 10, "top_p": 0.95}]
BENCH_SHAPES = [{"B": b, "V": 151936, "K": 10, "top_p": 0.95} for b in (1, 16, 64)]


def make_inputs(shape: dict[str, int], *, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, object]:
    B, V = shape["B"], shape["V"]
    g = torch.Generator().manual_seed(seed)
    logits_BV = (3 * torch.randn(B, V, generator=g)).to(dtype)  # in bfloat16 many are equal
    logits_BV[:, V // 2:V // 2 + 9] = -torch.inf if V > 100 else 0.0  # forbidden tokens
    noise = ClippedGumbel(shift=0.0) if shape.get("two_sided") else ClippedGumbel()
    return {"logits_BV": logits_BV.to(device), "temperature": 0.9, "top_k": shape["K"],
            "top_p": shape.get("top_p", 1.0), "noise": noise, "mixture_temperature": 0.7,
            "seed": torch.tensor(7 - 2**36, device=device),
            "counter_B3": torch.randint(2**16, (B, 3), generator=g).to(device)}


def bytes_moved(shape: dict[str, int], dtype: torch.dtype) -> int:
    """Least traffic: the logits once."""
    return shape["B"] * (shape["V"] * dtype.itemsize + shape["K"] * 20)
