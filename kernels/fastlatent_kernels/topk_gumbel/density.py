"""What training makes of a recorded mixture of tokens: its weights again, and the log-density of its noisy scores.

The density is a surrogate: the mean over the k scores of a standard Gumbel's, located at today's log-probabilities. It knows
neither of the noise's bounds and shift nor of the choice of the k best (arXiv:2604.27998).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlatent_kernels.check import compute_dtype


def mixture_weights(score_NK: Tensor, temperature: float) -> Tensor:
    """softmax(score / temperature) [N, K], float32 (float64 for float64); a score of -inf weighs 0."""
    return (score_NK.to(compute_dtype(score_NK)) / temperature).softmax(dim=1)


def kept_logprob(logprob_NK: Tensor, score_NK: Tensor) -> Tensor:
    """Log-probabilities renormalised over the ids of each row that were kept, those whose score is not -inf."""
    kept_NK = torch.where(score_NK > -torch.inf, logprob_NK, -torch.inf)
    return logprob_NK - kept_NK.logsumexp(dim=1, keepdim=True)


def gumbel_log_density(score_NK: Tensor, logprob_NK: Tensor, *, bounds: tuple[float, float] | None = None,
                       logprob_floor: float | None = None, bounded_N: Tensor | None = None) -> Tensor:
    """Mean over k of -d - exp(-d), d = score - logprob: [N], differentiable in `logprob_NK` with slope 1 - exp(-d).

    Args:
        score_NK: constant; -inf takes an id out of the mean.
        bounds: d is clamped into them, which stops its gradient outside.
        logprob_floor: takes ids whose log-probability is not above it out of the mean.
        bounded_N: bool; in these rows the slope of an id with d < 0 is exp(d) - 1, between -1 and 0, instead of 1 - exp(-d),
            which has no bound; values stay.
    """
    is_counted_NK = score_NK > -torch.inf
    d_NK = torch.where(is_counted_NK, score_NK, logprob_NK.detach()) - logprob_NK
    if logprob_floor is not None:
        is_counted_NK = is_counted_NK & (logprob_NK > logprob_floor)
    if bounds is not None:
        d_NK = d_NK.clamp(*bounds)
    density_NK = -d_NK - torch.exp(-d_NK)
    if bounded_N is not None:
        mirrored_NK = d_NK - torch.exp(d_NK)  # the density at -d
        is_bounded_NK = bounded_N[:, None] & (d_NK < 0)
        straight_NK = density_NK.detach() + (mirrored_NK - mirrored_NK.detach())
        density_NK = torch.where(is_bounded_NK, straight_NK, density_NK)
    counted_N = is_counted_NK.sum(dim=1).clamp(min=1)
    return torch.where(is_counted_NK, density_NK, 0.0).sum(dim=1) / counted_N
