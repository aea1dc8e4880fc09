"""The sampling head truncated to the k likeliest tokens: draw one of them, and give their weights in the mixture.

The draw is the two-level Gumbel-max of `vocab_head` restricted to the kept ids, with the same noise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastlatent_kernels.check import compute_dtype, expect, expect_noise, expect_number, expect_top_k
from fastlatent_kernels.dispatch import op
from fastlatent_kernels.noise import STREAM_ID, STREAM_TILE, TILE_SIZE, row_gumbel

MAX_TOP_K = 64


class TopkMixture(NamedTuple):
    token_B: Tensor  # int64
    logprob_B: Tensor  # float32, log softmax(logits / T) of the token over the whole vocabulary
    log_kept_B: Tensor  # float32, log of the mass top-k and top-p kept; it was drawn with logprob - log_kept
    entropy_B: Tensor  # float32, of softmax(logits / T) over the whole vocabulary, in nats
    ids_BK: Tensor  # int64, the k likeliest, likeliest first, the lower id first among equals
    weights_BK: Tensor  # float32, p / ||p||_2 of the renormalised kept distribution; 0 for ids that top-p drops


def _check(logits_BV, temperature, top_k, top_p, seed, counter_B3, greedy) -> None:
    expect("logits_BV", logits_BV, ("B", "V"))
    expect_number("temperature", temperature, "a number above 0", temperature > 0)
    expect_top_k(top_k, logits_BV.shape[1], MAX_TOP_K)
    expect_number("top_p", top_p, "a number above 0, at most 1", 0 < top_p <= 1)
    expect_noise(seed, counter_B3, logits_BV)


@op(backends=("triton", "native"), check=_check)
@torch.no_grad()
def topk_mixture(logits_BV: Tensor, temperature: float, top_k: int, top_p: float, seed: Tensor, counter_B3: Tensor,
                 greedy: bool) -> TopkMixture:
    """Draw a token from softmax(logits / temperature) truncated to its top k and top p, without gradient.

    Args:
        logits_BV: arithmetic is float32 (float64 for float64); -inf forbids a token. Where one is NaN, or all are forbidden,
            every number of the row is NaN, and its ids are any.
        top_p: keeps the tokens before which, likeliest first, less than this mass of the whole distribution lies.
        seed, counter_B3: int64, see `fastlatent_kernels.noise`; (position, prompt id, step * 2**16 + sample).
        greedy: take the likeliest token (the lowest id among equals); the weights keep their temperature.
    """
    raw_BV = logits_BV.to(compute_dtype(logits_BV))
    ids_BK = largest_ids(raw_BV, top_k)
    scaled_BV = raw_BV / temperature
    lse_B1 = scaled_BV.logsumexp(dim=1, keepdim=True)
    logprob_BV = scaled_BV - lse_B1
    # a forbidden token is 0 * -inf; its share is 0
    entropy_B = -torch.linalg.vecdot(logprob_BV.exp(), logprob_BV.clamp(min=torch.finfo(logprob_BV.dtype).min))

    logprob_BK = logprob_BV.gather(1, ids_BK)
    p_BK = logprob_BK.exp()
    if top_p < 1:
        before_BK = p_BK.cumsum(dim=1) - p_BK
        logprob_BK = torch.where(before_BK >= top_p, -torch.inf, logprob_BK)  # a NaN is kept
    log_kept_B = logprob_BK.logsumexp(dim=1).clamp(max=0.0)
    # relative to the likeliest, which is always kept: its 1 keeps the norm from underflow
    unscaled_BK = (logprob_BK - logprob_BK[:, :1]).exp()
    weights_BK = unscaled_BK / unscaled_BK.norm(dim=1, keepdim=True)

    place_B1 = torch.zeros_like(ids_BK[:, :1]) if greedy else _draw(logprob_BK, ids_BK, seed, counter_B3)
    return TopkMixture(ids_BK.gather(1, place_B1)[:, 0], logprob_BK.gather(1, place_B1)[:, 0], log_kept_B, entropy_B,
                       ids_BK, weights_BK)


def _draw(logprob_BK: Tensor, ids_BK: Tensor, seed: Tensor, counter_B3: Tensor) -> Tensor:
    """Place [B, 1] of the token drawn among the kept ones."""
    tile_BK = ids_BK // TILE_SIZE
    is_same_BKK = tile_BK[:, :, None] == tile_BK[:, None, :]
    tile_lse_BK = torch.where(is_same_BKK, logprob_BK[:, None, :], -torch.inf).logsumexp(dim=2)
    best_B1 = (tile_lse_BK + row_gumbel(seed, tile_BK, STREAM_TILE, counter_B3)).argmax(dim=1, keepdim=True)
    key_BK = logprob_BK + row_gumbel(seed, ids_BK, STREAM_ID, counter_B3)
    return torch.where(tile_BK == tile_BK.gather(1, best_B1), key_BK, -torch.inf).argmax(dim=1, keepdim=True)


def largest_ids(raw_BV: Tensor, top_k: int) -> Tensor:
    """Ids of the k largest logits, largest first, lower id first among equals, which torch.topk does not promise."""
    if raw_BV.dtype == torch.float64:
        return raw_BV.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    bits_BV = (raw_BV + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ordered_BV = bits_BV ^ ((bits_BV >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    last = raw_BV.shape[1] - 1
    key_BV = (ordered_BV.long() << 32) + (last - torch.arange(raw_BV.shape[1], device=raw_BV.device))
    return last - (key_BV.topk(top_k, dim=1).values & 0xFFFFFFFF)
