"""The sampling head over the whole vocabulary: draw a token, and mix all embeddings by their probabilities.

Sampling is exact two-level Gumbel-max: the tile of 128 ids with the largest logsumexp(tile) + Gumbel, then the id
inside it with the largest logit + Gumbel. It needs V / 128 + 128 random numbers a row instead of V, and gives the law
of softmax exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastlatent_kernels.check import FLOATS, expect, expect_noise, expect_number
from fastlatent_kernels.dispatch import op
from fastlatent_kernels.noise import STREAM_ID, STREAM_TILE, TILE_SIZE, row_gumbel
from fastlatent_kernels.token_logprob import head_logits


class VocabHead(NamedTuple):
    token_B: Tensor  # int64
    logprob_B: Tensor  # float32, log softmax(logits / T) of the token
    entropy_B: Tensor  # float32, of softmax(logits / T), in nats
    mixture_BD: Tensor | None  # p @ embed / ||p||_2 in the dtype of embed; None where no embed was given


def _check(hidden_BD, weight_VD, temperature, seed, counter_B3, greedy, embed_VD) -> None:
    expect("hidden_BD", hidden_BD, ("B", "D"))
    expect("weight_VD", weight_VD, ("V", hidden_BD.shape[1]), like=hidden_BD)
    expect_number("temperature", temperature, "a number above 0", temperature > 0)
    expect_noise(seed, counter_B3, hidden_BD)
    if embed_VD is not None:
        expect("embed_VD", embed_VD, (weight_VD.shape[0], "E"), FLOATS, like=hidden_BD)


@op(backends=("triton", "native", "cuda"), check=_check)
@torch.no_grad()
def vocab_head(hidden_BD: Tensor, weight_VD: Tensor, temperature: float, seed: Tensor, counter_B3: Tensor,
               greedy: bool, embed_VD: Tensor | None) -> VocabHead:
    """Draw a token from softmax(hidden @ weight.T / temperature) without gradient.

    Args:
        hidden_BD: its dtype is that of the GEMM; everything after it is float32 (float64 for float64).
        temperature: above 0; it shapes the mixture and the log-probability even where `greedy`.
        seed, counter_B3: int64, see `fastlatent_kernels.noise`; (position, prompt id, step * 2**16 + sample).
        greedy: take the likeliest token (the lowest id among equals) instead of drawing one.
        embed_VD: the input embedding, where the mixture is wanted.
    """
    logits_BV = head_logits(hidden_BD, weight_VD) / temperature
    tiles_BCJ = _tiles(logits_BV)
    tile_lse_BC = tiles_BCJ.logsumexp(dim=2)
    lse_B1 = tile_lse_BC.logsumexp(dim=1, keepdim=True)
    if greedy:
        token_B = logits_BV.argmax(dim=1)
    else:
        token_B = _draw(tiles_BCJ, tile_lse_BC, seed, counter_B3)
    logprob_BV = logits_BV - lse_B1
    p_BV = logprob_BV.exp()
    entropy_B = -torch.linalg.vecdot(p_BV, logprob_BV)
    mixture_BD = None
    if embed_VD is not None:
        mixture_BD = (p_BV / p_BV.norm(dim=1, keepdim=True)).to(embed_VD.dtype) @ embed_VD
    return VocabHead(token_B, logprob_BV.gather(1, token_B[:, None])[:, 0], entropy_B, mixture_BD)


def _tiles(logits_BV: Tensor) -> Tensor:
    """[B, tiles, 128], the last tile filled up with -inf."""
    missing = -logits_BV.shape[1] % TILE_SIZE
    return pad(logits_BV, (0, missing), value=-torch.inf).unflatten(1, (-1, TILE_SIZE))


def _draw(tiles_BCJ: Tensor, tile_lse_BC: Tensor, seed: Tensor, counter_B3: Tensor) -> Tensor:
    device = tiles_BCJ.device
    tile_index_C = torch.arange(tiles_BCJ.shape[1], device=device)
    tile_B1 = (tile_lse_BC + row_gumbel(seed, tile_index_C, STREAM_TILE, counter_B3)).argmax(dim=1, keepdim=True)
    inside_BJ = tiles_BCJ.take_along_dim(tile_B1[:, :, None], dim=1)[:, 0]
    id_BJ = tile_B1 * TILE_SIZE + torch.arange(TILE_SIZE, device=device)
    place_B1 = (inside_BJ + row_gumbel(seed, id_BJ, STREAM_ID, counter_B3)).argmax(dim=1, keepdim=True)
    return (tile_B1 * TILE_SIZE + place_B1)[:, 0]
