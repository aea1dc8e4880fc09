"""Mixtures of tokens drawn with Gumbel noise: the action of Latent-GRPO (arXiv:2604.27998) and of SofT-GRPO (arXiv:2511.06411).

    score_k = log p(id_k) + noise_k     weights = softmax(score / tau)     noise = scale * (clip(Gumbel, low, high) + shift)

The k scores are the action: its weights and its log-density follow from them. p is at temperature 1, whatever that of tokens.

candidates=union (Latent-GRPO): the k best scores among the top-p nucleus and the top k.
candidates=renormalised (SofT-GRPO): the top k inside the nucleus, p renormalised over them; an id outside has score -inf.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch
from fastlatent_kernels import ClippedGumbel, topk_gumbel, topk_mixture
from fastlatent_kernels.noise import STREAM_LATENT, row_gumbel
from fastlatent_kernels.topk_gumbel.density import gumbel_log_density, kept_logprob
from fastlatent_kernels.topk_mixture import MAX_TOP_K
from torch import Tensor

from fastlatent.errors import UserError
from fastlatent.methods.base import MethodConfig

CANDIDATES = ("union", "renormalised")
_LEAST_P = 1e-6  # added to p by the released SofT-GRPO before its logarithm


@dataclass(kw_only=True)
class MixtureConfig(MethodConfig):
    top_k: int = 10
    """Tokens in a mixture, 1 to 64."""
    top_p: float = 0.95
    """Mass of the nucleus that candidates come from."""
    candidates: str = "union"
    """union: the nucleus and the top_k likeliest. renormalised: the top_k inside the nucleus, their mass renormalised in the
    draw and in the density."""
    noise_low: float = -1.5
    """Gumbel noise is clipped below at this."""
    noise_high: float = 3.0
    """Gumbel noise is clipped above at this."""
    one_sided: bool = True
    """Shift the clipped noise up by -noise_low + delta, so that it is never negative: then a gradient step never moves a
    drawn token against its advantage."""
    delta: float = 0.0
    """Further shift of one-sided noise; the paper's is above 0 and not published, the released code has 0."""
    noise_scale: float = 1.0
    """Factor on the noise. Other than 1 it biases the density that is learnt from; 0 is no noise."""
    mixture_temperature: float = 1.0
    """tau: the weights are softmax(score / tau)."""
    clamp_density: bool = False
    """Clamp score - log p into the noise's interval before its density is taken."""
    logprob_floor: Optional[float] = None
    """Leave tokens out of the density whose log p is not above this; null: none."""

    def __post_init__(self):
        if self.candidates not in CANDIDATES:
            raise UserError(f"method.candidates: {self.candidates!r} is not one of {', '.join(CANDIDATES)}")
        if not 1 <= self.top_k <= MAX_TOP_K:
            raise UserError(f"method.top_k: wanted 1 to {MAX_TOP_K} tokens in a mixture, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"method.top_p: wanted more than 0 and at most 1, got {self.top_p}")
        if self.noise_low > self.noise_high:
            raise UserError(f"method.noise_low, method.noise_high: wanted low <= high, got {self.noise_low}, {self.noise_high}")
        if self.delta < 0 or (self.delta and not self.one_sided):
            raise UserError(f"method.delta: wanted 0 or more, and only with method.one_sided=true, got {self.delta}")
        if self.noise_scale < 0:
            raise UserError(f"method.noise_scale: wanted 0 or more, got {self.noise_scale}")
        if self.mixture_temperature <= 0:
            raise UserError(f"method.mixture_temperature: wanted more than 0, got {self.mixture_temperature}")

    @property
    def noise(self) -> ClippedGumbel:
        shift = self.delta - self.noise_low if self.one_sided else 0.0
        return ClippedGumbel(self.noise_low, self.noise_high, shift, self.noise_scale)

    @property
    def noise_bounds(self) -> tuple[float, float]:
        """The interval the noise lies in."""
        low, high, shift, scale = self.noise
        return scale * (low + shift), scale * (high + shift)


class Mixture(NamedTuple):
    ids_BK: Tensor  # int64
    score_BK: Tensor  # float32; -inf where no token is
    logprob_BK: Tensor  # float32, over the whole vocabulary at temperature 1
    best_B: Tensor  # int64, the id of the largest score
    likeliest_B: Tensor  # int64, the id of the largest logit


def draw(config: MixtureConfig, logits_BV: Tensor, noiseless: bool, seed: Tensor, counter_B3: Tensor) -> Mixture:
    """One mixture a row, of `logits_BV` at temperature 1; without noise its scores are the log-probabilities."""
    noise = config.noise._replace(scale=0.0) if noiseless else config.noise
    if config.candidates == "union":
        drawn = topk_gumbel(logits_BV, 1.0, config.top_k, config.top_p, noise, config.mixture_temperature, seed, counter_B3)
        return Mixture(drawn.ids_BK, drawn.score_BK, drawn.logprob_BK, drawn.ids_BK[:, 0], drawn.likeliest_B)
    # its weights are the renormalised p but for a factor, its own draw is of no use here; likeliest first
    head = topk_mixture(logits_BV, 1.0, config.top_k, config.top_p, seed, counter_B3, True)
    p_BK = head.weights_BK / head.weights_BK.sum(dim=1, keepdim=True)
    gumbel_BK = row_gumbel(seed, head.ids_BK, STREAM_LATENT, counter_B3).clamp(noise.low, noise.high)
    score_BK = torch.log(p_BK + _LEAST_P) + noise.scale * (gumbel_BK + noise.shift)
    score_BK = torch.where(p_BK > 0, score_BK, -torch.inf)
    best_B = head.ids_BK.gather(1, score_BK.argmax(dim=1, keepdim=True))[:, 0]
    return Mixture(head.ids_BK, score_BK, torch.log(p_BK) + head.log_kept_B[:, None], best_B, head.ids_BK[:, 0])


def scores_of(config: MixtureConfig, ids_NK: Tensor, weights_NK: Tensor, seed: Tensor, counter_N3: Tensor,
              noise: bool) -> Tensor:
    """Scores [N, K] as `draw` would make them of a policy that predicts `weights_NK`; -inf where the weight is 0."""
    score_NK = torch.log(weights_NK)
    if noise:
        gumbel_NK = row_gumbel(seed, ids_NK, STREAM_LATENT, counter_N3).clamp(config.noise.low, config.noise.high)
        score_NK = score_NK + config.noise.scale * (gumbel_NK + config.noise.shift)
    return score_NK


def noise_of(config: MixtureConfig, score_NK: Tensor, logprob_NK: Tensor) -> Tensor:
    """d [N, K], the noise that recorded scores hold where the model gives their ids `logprob_NK`; -inf where no token is."""
    return score_NK - (kept_logprob(logprob_NK, score_NK) if config.candidates == "renormalised" else logprob_NK)


def log_density(config: MixtureConfig, score_NK: Tensor, logprob_NK: Tensor, bounded_N: Tensor | None = None) -> Tensor:
    """The surrogate log-density [N] of recorded scores where the model gives their ids `logprob_NK` at temperature 1.

    `bounded_N`: rows whose slope is bounded where a score lies below its log-probability, see `gumbel_log_density`.
    """
    if config.candidates == "renormalised":
        logprob_NK = kept_logprob(logprob_NK, score_NK)
    return gumbel_log_density(score_NK, logprob_NK, bounds=config.noise_bounds if config.clamp_density else None,
                              logprob_floor=config.logprob_floor, bounded_N=bounded_N)
