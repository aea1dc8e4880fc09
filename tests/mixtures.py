"""Policies, rollouts and groups that the tests of Latent-GRPO and SofT-GRPO share."""

from __future__ import annotations

from types import SimpleNamespace

import tiny
import torch

from fastlatent.methods.base import METHODS
from fastlatent.objectives import token_weights
from fastlatent.packing import Item, pack
from fastlatent.policy import Policy
from fastlatent.schema import AnswerConfig, ModelConfig, ObjectiveConfig, ThinkingConfig
from fastlatent.types import Batch, Group, Rollout, Sampling

FORCED = (ThinkingConfig(end="####", force="\n#### ", max_tokens=12, stop=["\n"]), AnswerConfig(max_tokens=6, stop=["\n"]))
UNFORCED = (ThinkingConfig(end="####"), AnswerConfig())  # the tiny model hardly ever writes it: latents to the end
SEED = torch.tensor(11)
OBJECTIVE = ObjectiveConfig(advantage_eps=1e-6)
GRPO, LATENT_GRPO, SOFT_GRPO = (METHODS.find(name, "") for name in ("grpo", "latent_grpo", "soft_grpo"))


def policy_of(method, *, base=None, has_reference=False, **options) -> Policy:
    return Policy(base or tiny.model(), ModelConfig(path="tiny", dtype="float32", freeze_embedding=True), method,
                  method.Config(**options), has_reference=has_reference)


def rollouts_of(policy: Policy, ends=FORCED, **sampling) -> list[Rollout]:
    options = {"temperature": 0.8, "max_new_tokens": 32} | sampling
    return tiny.engine(policy, *ends).generate(tiny.requests(tiny.prompts([5, 9]), 4), Sampling(**options))


def counters(num_rows: int) -> torch.Tensor:
    row = torch.arange(num_rows)
    return torch.stack([row % 7, row // 7, row * 3 + 1], dim=1)


def group_of(rewards: list[float], cut: list[bool], logprobs: list[list[float]] | None = None) -> Group:
    logprobs = logprobs or [[-1.0] * 3] * len(rewards)
    rollouts = [SimpleNamespace(finish="length" if is_cut else "stop", logprobs=row, acted=[True] * len(row))
                for is_cut, row in zip(cut, logprobs, strict=True)]
    return Group(rollouts, torch.tensor(rewards, dtype=torch.float64), {})


def batch_of(policy: Policy, rollouts: list[Rollout], share_prompts: bool = True) -> Batch:
    weights = token_weights(rollouts, ObjectiveConfig(), 32)
    items = [Item(r, [(-1.0) ** (i + k) * (1 + 0.1 * k) for k in range(sum(r.acted))], w)
             for i, (r, w) in enumerate(zip(rollouts, weights, strict=True))]
    return pack(items, torch.device("cpu"), share_prompts)
