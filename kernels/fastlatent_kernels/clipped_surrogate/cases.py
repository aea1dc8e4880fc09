"""Inputs for the tests and the benchmark of clipped_surrogate."""

from __future__ import annotations

import torch

TEST_SHAPES = [{"A": 1}, {"A": 65}, {"A": 4096}]
BENCH_SHAPES = [{"A": a} for a in (4096, 32768)]


def make_inputs(shape: dict[str, int], *, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, object]:
    A = shape["A"]
    g = torch.Generator().manual_seed(seed)
    logprob_A = -torch.rand(A, generator=g) * 5
    near = lambda: logprob_A + torch.randn(A, generator=g) * 0.3
    inputs = {"logprob_A": logprob_A, "old_logprob_A": near(), "ref_logprob_A": near(),
              "entropy_A": torch.rand(A, generator=g) * 3, "advantage_A": torch.randn(A, generator=g),
              "weight_A": (torch.rand(A, generator=g) < 0.8) / A}
    # log-probabilities are float32 whatever the dtype of the model
    return {name: value.to(device) for name, value in inputs.items()} | {
        "clip_low": 0.2, "clip_high": 0.28, "dual_clip": 1.5, "kl_coef": 0.1,
        "kl_estimator": "k3", "entropy_coef": 0.01}


def bytes_moved(shape: dict[str, int], dtype: torch.dtype) -> int:
    """Six float32 columns in."""
    return 24 * shape["A"]
