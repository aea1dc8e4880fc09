"""GRPO (arXiv:2402.03300): token-only group-relative policy optimisation; every variant of it is objective config.

DAPO: objective.normalizer=token_mean, clip_high=0.28, filter_zero_variance=true. Dr.GRPO: normalizer=constant,
advantage=mean_only.
Deviation from the paper: one optimizer step per rollout by default, so the ratio is 1 and nothing is clipped.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastlatent.methods.base import METHODS, Method, MethodConfig


@METHODS.register("grpo")
class GRPO(Method):
    """What `Method` already is."""

    @dataclass(kw_only=True)
    class Config(MethodConfig):
        name: str = "grpo"
