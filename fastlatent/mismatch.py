"""Mismatch: how far the engine that sampled is from the trainer that learns, and importance weights that correct for it.

    delta_A = log-probability under the trainer - log-probability under the engine, before any weight moves
    ratio_A = exp(delta_A), or at sequence level exp(sum of delta over the completion) for each of its tokens

Both sides are at the sampling temperature and over the whole vocabulary. Where sampling is truncated, `log_kept` is left
out: the behaviour policy divides by the kept mass on both sides, and the engine's number stands for the trainer's too; on
one side alone it would make every ratio the kept mass, where nothing disagrees.

A scored place counts as `latent` where what it read was a latent input or what it drew was a latent action, else as `token`.

Deviations: TRL leaves its KL term out of the importance weight; here a weight multiplies all of a token's loss, since all of
it is an expectation over what the trainer's policy would have drawn. No weight is renormalised: the step's token count stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastlatent.schema import MismatchConfig
from fastlatent.types import Batch

PERCENTILES = (1, 50, 99)
_MAX_LOG_RATIO = 20.0  # as in the surrogate: no ratio overflows


@dataclass(slots=True)
class Gap:
    """The mismatch of the scored places of one microbatch, on the device."""

    delta_A: Tensor  # float32, in nats
    latent_A: Tensor  # bool
    ratio_A: Tensor  # float32, at the level of the correction; of the token where there is none
    corrected_A: Tensor | None  # float32, what the token's loss is multiplied by; None: no correction


def measure(batch: Batch, logprob_A: Tensor, config: MismatchConfig) -> Gap:
    """Compare `logprob_A`, the trainer's at the sampling temperature, with what the engine wrote down."""
    delta_A = logprob_A.detach().float() - batch.behaviour_logprob_A
    log_ratio_A = _over_sequences(delta_A, batch.sequence_A) if config.correction.startswith("sequence") else delta_A
    ratio_A = log_ratio_A.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    latent_A = batch.latent_T[batch.score_A]
    if batch.actions is not None:
        latent_A[batch.actions.latent_N] = True
    return Gap(delta_A, latent_A, ratio_A, _corrected(ratio_A, config))


def apply(gap: Gap, batch: Batch) -> None:
    """Weigh each token's loss by its corrected ratio, a constant to the gradient."""
    if gap.corrected_A is not None:
        batch.weight_A = batch.weight_A * gap.corrected_A


def _corrected(ratio_A: Tensor, config: MismatchConfig) -> Tensor | None:
    """truncate: the ratio clamped to [ratio_min, ratio_max]; mask: the ratio inside that range and 0 outside."""
    if config.correction == "none":
        return None
    inside_A = ratio_A.clamp(config.ratio_min, config.ratio_max)
    if config.correction.endswith("truncate"):
        return inside_A
    # a ratio that is not a number stays: the step it spoils is the guard's to skip
    return torch.where((ratio_A == inside_A) | ratio_A.isnan(), ratio_A, 0.0)


def _over_sequences(delta_A: Tensor, sequence_A: Tensor) -> Tensor:
    """At each token the sum over its sequence; `sequence_A` does not descend."""
    # float64: a difference of running sums over the whole batch
    sum_A = torch.cat([delta_A.new_zeros(1, dtype=torch.float64), delta_A.double().cumsum(0)])
    first_A = torch.searchsorted(sequence_A, sequence_A)
    behind_A = torch.searchsorted(sequence_A, sequence_A, right=True)
    return (sum_A[behind_A] - sum_A[first_A]).float()


# ---- what the log says ----------------------------------------------------------------------------------------------


def summary(gaps: Sequence[Gap]) -> dict[str, float]:
    """The `sampling/*` metrics of a step, as host numbers; a kind of position without a token is left out."""
    if not gaps:
        return {}
    delta_A, latent_A, ratio_A = (_host(gaps, name) for name in ("delta_A", "latent_A", "ratio_A"))
    corrected_A = None if gaps[0].corrected_A is None else _host(gaps, "corrected_A")
    size_A = np.abs(delta_A)
    out = {"sampling/sampling_logp_difference/mean": size_A.mean(), "sampling/sampling_logp_difference/max": size_A.max()}
    for kind, is_kind_A in (("token", ~latent_A), ("latent", latent_A)):
        if is_kind_A.any():
            corrected = None if corrected_A is None else corrected_A[is_kind_A]
            out |= _of_kind(kind, delta_A[is_kind_A], ratio_A[is_kind_A], corrected)
    return {name: float(value) for name, value in out.items()}


def _of_kind(kind: str, delta_A: np.ndarray, ratio_A: np.ndarray, corrected_A: np.ndarray | None) -> dict[str, float]:
    out = {f"sampling/{kind}/num_tokens": len(delta_A),
           f"sampling/{kind}/logp_difference/mean": np.abs(delta_A).mean(),
           f"sampling/{kind}/logp_difference/max": np.abs(delta_A).max(),
           f"sampling/{kind}/kl": k3(delta_A).mean()}
    for stage, weight_A in (("raw", ratio_A), ("corrected", corrected_A)):
        if weight_A is not None:
            out[f"sampling/{kind}/ratio_{stage}/effective_sample_size"] = effective_sample_size(weight_A)
            for percent, value in zip(PERCENTILES, np.percentile(weight_A, PERCENTILES), strict=True):
                out[f"sampling/{kind}/ratio_{stage}/p{percent}"] = value
    if corrected_A is not None:
        out[f"sampling/{kind}/frac_corrected"] = (corrected_A != ratio_A).mean()
    return out


def k3(delta_A: np.ndarray) -> np.ndarray:
    """exp(delta) - 1 - delta: its mean over tokens the engine drew estimates KL(engine || trainer), never below 0
    (http://joschu.net/blog/kl-approx.html)."""
    delta_A = delta_A.clip(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return np.expm1(delta_A) - delta_A


def effective_sample_size(weight_A: np.ndarray) -> float:
    """(sum w)^2 / sum w^2 (Kish): n where all weights are equal, 1 where one outweighs all, 0 where all are 0."""
    square = np.square(weight_A).sum()
    return float(weight_A.sum() ** 2 / square) if square else 0.0


def _host(gaps: Sequence[Gap], name: str) -> np.ndarray:
    values = torch.cat([getattr(gap, name) for gap in gaps]).cpu()
    return (values if values.dtype == torch.bool else values.double()).numpy()
