"""Inputs for the tests and the benchmark of policy_gradient_head."""

from __future__ import annotations

import torch

from fastlatent_kernels.token_logprob import token_logprob

TEST_SHAPES = [{"A": 1, "D": 1, "V": 2}, {"A": 7, "D": 65, "V": 131}, {"A": 70, "D": 32, "V": 300}]
BENCH_SHAPES = [{"A": a, "D": 576, "V": 49152} for a in (256, 2048)] + [{"A": 32768, "D": 1536, "V": 151936}]
TEMPERATURE = 0.8


def make_inputs(shape: dict[str, int], *, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, object]:
    A, D, V = shape["A"], shape["D"], shape["V"]
    g = torch.Generator().manual_seed(seed)
    hidden_AD, weight_VD = torch.randn(A, D, generator=g).to(dtype), 2 * torch.randn(V, D, generator=g) / D**0.5
    target_A = torch.randint(V, (A,), generator=g)
    columns = {"advantage_A": torch.randn(A, generator=g), "weight_A": (torch.rand(A, generator=g) < 0.8) / A}
    head = {"hidden_AD": hidden_AD.to(device), "weight_VD": weight_VD.to(device), "target_A": target_A.to(device)}
    with torch.no_grad():
        logprob_A = token_logprob(**head, temperature=TEMPERATURE)[0].cpu()
    # a policy is near its old self and its reference
    for name in ("old_logprob_A", "ref_logprob_A"):
        columns[name] = logprob_A + torch.randn(A, generator=g) * 0.3
    return head | {name: value.to(device) for name, value in columns.items()} | {
        "temperature": TEMPERATURE, "clip_low": 0.2, "clip_high": 0.28, "dual_clip": 1.5, "kl_coef": 0.1,
        "kl_estimator": "k3", "entropy_coef": 0.01}


def bytes_moved(shape: dict[str, int], dtype: torch.dtype) -> int:
    """Least traffic: weights and hidden states once, their gradients once (the weight's in float32)."""
    V, A, D = shape["V"], shape["A"], shape["D"]
    return 2 * A * D * dtype.itemsize + V * D * (dtype.itemsize + 4) + 32 * A


def flops(shape: dict[str, int]) -> int:
    """Three GEMMs: logits, gradient of hidden, gradient of weight."""
    return 6 * shape["A"] * shape["D"] * shape["V"]
