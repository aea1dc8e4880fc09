"""Group-relative advantages: how much better each rollout did than its siblings.

Deviation from the GRPO paper: a group whose rewards are all equal gives 0, not a division by a vanishing deviation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlatent_kernels.check import expect, expect_number
from fastlatent_kernels.dispatch import op

KINDS = ("z_score", "mean_only", "leave_one_out")


def _check(reward_SG, mask_SG, kind, eps) -> None:
    expect("reward_SG", reward_SG, ("S", "G"), (torch.float64,))
    expect("mask_SG", mask_SG, tuple(reward_SG.shape), (torch.bool,), like=reward_SG)
    if kind not in KINDS:
        raise ValueError(f"kind: expected {', '.join(KINDS)}, got {kind!r}")
    expect_number("eps", eps, "a number >= 0", eps >= 0)


@op(backends=("triton",), check=_check)
@torch.no_grad()
def group_advantage(reward_SG: Tensor, mask_SG: Tensor, kind: str, eps: float) -> Tensor:
    """Advantage [S, G], float32 from float64 sums, of each valid reward among the valid rewards r of its row.

    z_score: (r - mean) / (std + eps), ddof 1. mean_only: r - mean (Dr.GRPO). leave_one_out: r - mean of others (RLOO).
    Exactly 0 where masked, and in groups with fewer than two valid rewards or with all of them equal.

    Args:
        mask_SG: True where there is a reward; a masked reward may hold anything.
    """
    r_SG = torch.where(mask_SG, reward_SG, 0.0)
    n_S1 = mask_SG.sum(dim=1, keepdim=True).double()
    from_mean_SG = torch.where(mask_SG, r_SG - r_SG.sum(dim=1, keepdim=True) / n_S1, 0.0)
    if kind == "z_score":
        std_S1 = (from_mean_SG.square().sum(dim=1, keepdim=True) / (n_S1 - 1)).sqrt()
        advantage_SG = from_mean_SG / (std_S1 + eps)
    elif kind == "leave_one_out":
        advantage_SG = from_mean_SG * n_S1 / (n_S1 - 1)
    else:
        advantage_SG = from_mean_SG
    lowest_S1 = torch.where(mask_SG, reward_SG, torch.inf).amin(dim=1, keepdim=True)
    highest_S1 = torch.where(mask_SG, reward_SG, -torch.inf).amax(dim=1, keepdim=True)
    # covers the divisions by n and n - 1 above: no group of fewer than two has two different rewards
    teaches_SG = mask_SG & (highest_S1 > lowest_S1)
    return torch.where(teaches_SG, advantage_SG, 0.0).float()
