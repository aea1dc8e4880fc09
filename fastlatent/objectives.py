"""Which tokens count how much, and the one surrogate they are given to.

Every weight is divided by a count over the whole step, never over a microbatch, so a gradient does not depend on packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastlatent_kernels import clipped_surrogate, policy_gradient_head
from fastlatent_kernels.clipped_surrogate import STATS
from torch import Tensor

from fastlatent.schema import ObjectiveConfig
from fastlatent.types import Batch, Loss, Rollout, Scored


def token_weights(rollouts: Sequence[Rollout], objective: ObjectiveConfig, max_new_tokens: int) -> list[float]:
    """The weight of each acted token of each rollout; they sum to 1 over the step for token_mean and sequence_mean.

    token_mean (DAPO): 1 / all acted tokens. sequence_mean (GRPO): 1 / (completions x own acted tokens).
    constant (Dr.GRPO): 1 / (completions x constant_length). Masked completions weigh 0 and are counted nowhere.
    """
    length = [sum(r.acted) for r in rollouts]
    counts = [n > 0 and not (objective.mask_truncated_completions and r.finish == "length")
              for n, r in zip(length, rollouts, strict=True)]
    num_rollouts = sum(counts)
    num_tokens = sum(n for n, is_counted in zip(length, counts, strict=True) if is_counted)
    constant = objective.constant_length or max_new_tokens

    def weight(n: int) -> float:
        match objective.normalizer:
            case "token_mean":
                return 1.0 / num_tokens
            case "sequence_mean":
                return 1.0 / (num_rollouts * n)
            case "constant":
                return 1.0 / (num_rollouts * constant)
        raise ValueError(f"objective.normalizer: {objective.normalizer!r}")

    return [weight(n) if is_counted else 0.0 for n, is_counted in zip(length, counts, strict=True)]


def surrogate(scored: Scored, batch: Batch, objective: ObjectiveConfig) -> Loss:
    """The clipped policy-gradient surrogate with its KL and entropy terms, and its statistics as device sums."""
    result = clipped_surrogate(scored.logprob_A, batch.old_logprob_A, batch.ref_logprob_A, scored.entropy_A,
                               batch.advantage_A, batch.weight_A, **_options(objective))
    return Loss(result.loss, dict(zip(STATS, result.stats, strict=True)), scored.logprob_A.detach())


def surrogate_of_hidden(hidden_AD: Tensor, head_VD: Tensor, batch: Batch, temperature: float,
                        objective: ObjectiveConfig) -> Loss:
    """The same of the log-probabilities that `hidden_AD` and the head's weight give the targets, a matrix product cheaper."""
    result = policy_gradient_head(hidden_AD, head_VD, batch.target_A, batch.old_logprob_A, batch.ref_logprob_A,
                                  batch.advantage_A, batch.weight_A, temperature=temperature, **_options(objective))
    return Loss(result.loss, dict(zip(STATS, result.stats, strict=True)), result.logprob_A)


def _options(objective: ObjectiveConfig) -> dict[str, Any]:
    return {"clip_low": objective.clip_low, "clip_high": objective.clip_high, "dual_clip": objective.dual_clip,
            "kl_coef": objective.kl_coef, "kl_estimator": objective.kl_estimator, "entropy_coef": objective.entropy_coef}
