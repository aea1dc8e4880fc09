"""Inputs for the tests and the benchmark of group_advantage."""

from __future__ import annotations

import torch

TEST_SHAPES = [{"S": 1, "G": 1}, {"S": 5, "G": 7, "kind": "mean_only"}, {"S": 64, "G": 16},
               {"S": 9, "G": 8, "kind": "leave_one_out"}]
BENCH_SHAPES = [{"S": 64, "G": 16}]


def make_inputs(shape: dict[str, int], *, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, object]:
    size = shape["S"], shape["G"]
    g = torch.Generator().manual_seed(seed)
    # rewards are float64 whatever the dtype of the model
    return {"reward_SG": torch.randn(size, generator=g).double().to(device),
            "mask_SG": (torch.rand(size, generator=g) < 0.8).to(device),
            "kind": shape.get("kind", "z_score"), "eps": 1e-4}


def bytes_moved(shape: dict[str, int], dtype: torch.dtype) -> int:
    """Rewards and mask in, advantages out."""
    return shape["S"] * shape["G"] * 13
