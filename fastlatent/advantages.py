"""Group-relative advantages: how much better each rollout did than its siblings.

Rollouts without a reward (a reward function hung or failed) stand outside their group: advantage 0, not counted in its mean.
"""

from __future__ import annotations

import torch
from fastlatent_kernels import group_advantage
from torch import Tensor

from fastlatent.schema import ObjectiveConfig
from fastlatent.types import Group


def of_group(group: Group, objective: ObjectiveConfig) -> Tensor:
    """Advantage [G], float32; see `fastlatent_kernels.group_advantage` for the three kinds and their zero rules."""
    has_reward_G = ~group.reward_G.isnan()
    reward_G = torch.where(has_reward_G, group.reward_G, 0.0)
    return group_advantage(reward_G[None], has_reward_G[None], objective.advantage, objective.advantage_eps)[0]


def has_variance(group: Group) -> bool:
    """Whether the group can teach anything: at least two different rewards."""
    rewards = [reward for reward in group.reward_G.tolist() if reward == reward]
    return len(set(rewards)) > 1
