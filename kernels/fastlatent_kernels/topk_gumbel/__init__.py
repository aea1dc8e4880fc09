"""Latent-GRPO's sampler (arXiv:2604.27998): the k best of the likely tokens under clipped Gumbel noise.

A latent step acts with a mixture of k tokens. Their noisy scores are the action, from which training computes the
density again, so `ids` and `score` are what a rollout records. Scores relative to the candidates' mass, as SofT-GRPO
has them, are `score - log_kept`.

Deviation from the released code: its fall-back without noise, where the likeliest token ends the thinking, is left to
the method, which finds that token in `likeliest_B`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastlatent_kernels.check import compute_dtype, expect, expect_noise, expect_number, expect_top_k
from fastlatent_kernels.dispatch import op
from fastlatent_kernels.noise import STREAM_LATENT, row_gumbel
from fastlatent_kernels.topk_mixture import MAX_TOP_K, largest_ids


class ClippedGumbel(NamedTuple):
    """The noise of a score, `scale * (clip(g, low, high) + shift)` with g standard Gumbel.

    The defaults are the published one-sided noise in [0, 4.5]; its `delta` is added to `shift`, and two-sided noise has
    a shift of 0. A scale other than 1 biases the likelihood that training computes; 0 is no noise.
    """

    low: float = -1.5
    high: float = 3.0
    shift: float = 1.5
    scale: float = 1.0


class TopkGumbel(NamedTuple):
    ids_BK: Tensor  # int64, largest score first, the lower id first among equals
    score_BK: Tensor  # float32, log-probability + noise; -inf where fewer than k tokens are allowed
    logprob_BK: Tensor  # float32, log softmax(logits / T) of the ids over the whole vocabulary
    weights_BK: Tensor  # float32, softmax(score / mixture temperature)
    likeliest_B: Tensor  # int64, the id of the largest logit, without noise
    log_kept_B: Tensor  # float32, log of the candidates' mass
    num_candidates_B: Tensor  # int64
    entropy_B: Tensor  # float32, of softmax(logits / T) over the whole vocabulary, in nats


def _check(logits_BV, temperature, top_k, top_p, noise, mixture_temperature, seed, counter_B3) -> None:
    expect("logits_BV", logits_BV, ("B", "V"))
    expect_number("temperature", temperature, "a number above 0", temperature > 0)
    expect_top_k(top_k, logits_BV.shape[1], MAX_TOP_K)
    expect_number("top_p", top_p, "a number above 0, at most 1", 0 < top_p <= 1)
    expect_number("noise", noise, "low <= high and scale >= 0", noise.low <= noise.high and noise.scale >= 0)
    expect_number("mixture_temperature", mixture_temperature, "a number above 0", mixture_temperature > 0)
    expect_noise(seed, counter_B3, logits_BV)


@op(backends=("triton", "native"), check=_check)
@torch.no_grad()
def topk_gumbel(logits_BV: Tensor, temperature: float, top_k: int, top_p: float, noise: ClippedGumbel,
                mixture_temperature: float, seed: Tensor, counter_B3: Tensor) -> TopkGumbel:
    """The k best of `log softmax(logits / temperature) + noise` among the candidates, without gradient.

    Candidates are the top-p nucleus (tokens before which, likeliest first and the lower id first among equals, less
    than `top_p` of the mass lies) and the `top_k` likeliest. A fast backend never sorts: noise lies in an interval, so
    a token further below the k-th likeliest than its width cannot win.

    Args:
        logits_BV: arithmetic is float32 (float64 for float64); -inf forbids a token. Where one is NaN, or all are forbidden,
            every number of the row is NaN, and its ids and the count of its candidates are any.
        noise: one Gumbel number per token, stream 2 of `fastlatent_kernels.noise`, index its id.
        seed, counter_B3: int64, see `fastlatent_kernels.noise`; (position, prompt id, step * 2**16 + sample).
    """
    raw_BV = logits_BV.to(compute_dtype(logits_BV))
    logprob_BV = (raw_BV / temperature).log_softmax(dim=1)
    # a forbidden token is 0 * -inf; its share is 0
    entropy_B = -torch.linalg.vecdot(logprob_BV.exp(), logprob_BV.clamp(min=torch.finfo(logprob_BV.dtype).min))

    is_candidate_BV = _candidates(raw_BV, logprob_BV, top_k, top_p)
    log_kept_B = torch.where(is_candidate_BV, logprob_BV, -torch.inf).logsumexp(dim=1).clamp(max=0.0)
    gumbel_BV = row_gumbel(seed, torch.arange(raw_BV.shape[1], device=raw_BV.device), STREAM_LATENT, counter_B3)
    noise_BV = noise.scale * (gumbel_BV.clamp(noise.low, noise.high) + noise.shift)
    score_BV = torch.where(is_candidate_BV, logprob_BV + noise_BV, -torch.inf)

    ids_BK = largest_ids(score_BV, top_k)
    score_BK = score_BV.gather(1, ids_BK)
    return TopkGumbel(
        ids_BK, score_BK, logprob_BV.gather(1, ids_BK), (score_BK / mixture_temperature).softmax(dim=1),
        largest_ids(raw_BV, 1)[:, 0], log_kept_B, is_candidate_BV.sum(dim=1), entropy_B)


def _candidates(raw_BV: Tensor, logprob_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """bool [B, V]: in the nucleus or among the k likeliest, and allowed."""
    is_allowed_BV = (raw_BV > -torch.inf) | logprob_BV.isnan()  # what is not known is not hidden
    if top_p == 1:
        return is_allowed_BV
    order_BV = raw_BV.sort(dim=1, descending=True, stable=True).indices
    # float64: the sum of many small shares decides where the nucleus ends
    p_BV = logprob_BV.gather(1, order_BV).double().exp()
    is_kept_BV = ~(p_BV.cumsum(dim=1) - p_BV >= top_p)
    is_kept_BV[:, :top_k] = True
    return torch.zeros_like(is_kept_BV).scatter(1, order_BV, is_kept_BV) & is_allowed_BV
