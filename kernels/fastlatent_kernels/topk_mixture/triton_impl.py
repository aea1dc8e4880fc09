"""topk_mixture on a GPU: one pass over the logits, then one program a row for the k tiles that matter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlatent_kernels.aot import Compile
from fastlatent_kernels.library import LIBRARY
from fastlatent_kernels.noise import STREAM_ID, STREAM_TILE
from fastlatent_kernels.topk_mixture import TopkMixture, topk_mixture
from fastlatent_kernels.topk_mixture.row_topk import (
    NO_KEY,
    TILE,
    TILES_PER_CHUNK,
    best_tiles,
    id_of,
    key_of,
    largest_keys,
    load_logits,
    padded,
    row_softmax,
    row_tiles,
    row_tiles_kernel,
    value_of,
)
from fastlatent_kernels.triton_support import gumbel, noise_row, why_not_triton

NOISE_TILE, NOISE_ID = tl.constexpr(STREAM_TILE), tl.constexpr(STREAM_ID)


@triton.jit
def topk_mixture_kernel(
        logits_ptr, largest_ptr, chunk_ptr, seed_ptr, counter_ptr, token_ptr, logprob_ptr, log_kept_ptr, entropy_ptr,
        ids_ptr, weights_ptr, vocab_size, num_tiles, num_chunks, top_k, top_p, inv_temperature,
        GREEDY: tl.constexpr, NUCLEUS: tl.constexpr, NT: tl.constexpr, NC: tl.constexpr, KP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    likeliest, mass, entropy = row_softmax(chunk_ptr, row, num_chunks, inv_temperature, NC)
    log_mass = tl.log(mass)  # relative to the likeliest token

    tile_K = best_tiles(largest_ptr, row, num_tiles, top_k, NT, KP)
    id_KJ = tile_K[:, None] * TILE + tl.arange(0, TILE)[None, :]
    is_id_KJ = id_KJ < vocab_size
    logit_KJ = load_logits(logits_ptr, row, id_KJ, is_id_KJ, vocab_size)
    key_K = largest_keys(tl.where(is_id_KJ, key_of(logit_KJ, id_KJ), NO_KEY), top_k, KP)

    place_K = tl.arange(0, KP)
    is_kept_K = place_K < top_k
    id_K = tl.where(is_kept_K, id_of(key_K), 0)
    x_K = tl.where(is_kept_K, (value_of(key_K) - likeliest) * inv_temperature, -float("inf"))
    if NUCLEUS:
        share_K = tl.exp(x_K - log_mass)
        x_K = tl.where(tl.cumsum(share_K, 0) - share_K < top_p, x_K, -float("inf"))
    # relative to the likeliest, which is always kept: its 1 keeps the norm from underflow
    p_K = tl.exp(x_K)
    log_kept = tl.log(tl.sum(p_K)) - log_mass

    place = 0
    if not GREEDY:
        place = draw_place(id_K, x_K, p_K, seed_ptr, counter_ptr, row, KP)
    is_drawn_K = place_K == place
    tl.store(token_ptr + row, tl.sum(tl.where(is_drawn_K, id_K, 0)))
    tl.store(logprob_ptr + row, tl.sum(tl.where(is_drawn_K, x_K, 0.0)) - log_mass)
    # a comparison and not tl.minimum, which loses a NaN
    tl.store(log_kept_ptr + row, tl.where(log_kept > 0.0, 0.0, log_kept))
    tl.store(entropy_ptr + row, entropy)
    tl.store(ids_ptr + row * top_k + place_K, id_K, mask=is_kept_K)
    norm = tl.sqrt(tl.sum(p_K * p_K)) + (log_mass - log_mass)  # a NaN elsewhere in the row shows
    tl.store(weights_ptr + row * top_k + place_K, p_K / norm, mask=is_kept_K)


@triton.jit
def draw_place(id_K, x_K, p_K, seed_ptr, counter_ptr, row, KP: tl.constexpr):
    """Place among the kept ids of the one with the best tile, then the best id in it."""
    key_lo, key_hi, position, prompt, sample_word = noise_row(seed_ptr, counter_ptr, row)
    tile_K = (id_K // TILE).to(tl.int32)
    is_same_KK = tile_K[:, None] == tile_K[None, :]
    tile_mass_K = tl.sum(tl.where(is_same_KK, p_K[None, :], 0.0), axis=1)
    race_K = tl.log(tile_mass_K) + gumbel(key_lo, key_hi, tile_K, position, NOISE_TILE, prompt, sample_word)
    best_tile = tl.min(tl.where(race_K == tl.max(race_K), tile_K, 0x7FFFFFFF))
    race_K = x_K + gumbel(key_lo, key_hi, id_K.to(tl.int32), position, NOISE_ID, prompt, sample_word)
    race_K = tl.where(tile_K == best_tile, race_K, -float("inf"))
    return tl.min(tl.where(race_K == tl.max(race_K), tl.arange(0, KP), KP))


LIBRARY.define("topk_mixture_triton(Tensor logits, float temperature, int top_k, float top_p, Tensor seed, "
               "Tensor counter, bool greedy) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")


def _launch(logits_BV, temperature, top_k, top_p, seed, counter_B3, greedy):
    logits_BV, counter_B3 = logits_BV.contiguous(), counter_B3.contiguous()
    token_B, logprob_B, log_kept_B, entropy_B, ids_BK, weights_BK = out = _empty_outputs(logits_BV, top_k)
    tiles = row_tiles(logits_BV, temperature)
    num_rows, vocab_size = logits_BV.shape
    num_tiles, num_chunks = tiles.largest_BC.shape[1], tiles.chunk_B3N.shape[2]
    topk_mixture_kernel[(num_rows,)](
        logits_BV, tiles.largest_BC, tiles.chunk_B3N, seed, counter_B3, token_B, logprob_B, log_kept_B, entropy_B,
        ids_BK, weights_BK, vocab_size, num_tiles, num_chunks, top_k, top_p, 1.0 / temperature,
        GREEDY=greedy, NUCLEUS=top_p < 1, NT=padded(num_tiles), NC=padded(num_chunks), KP=padded(top_k), num_warps=8)
    return out


def _empty_outputs(logits_BV, top_k):
    num_rows, device = logits_BV.shape[0], logits_BV.device
    token_B, ids_BK = (torch.empty(size, dtype=torch.int64, device=device) for size in (num_rows, (num_rows, top_k)))
    logprob_B, log_kept_B, entropy_B = (torch.empty(num_rows, dtype=torch.float32, device=device) for _ in range(3))
    return token_B, logprob_B, log_kept_B, entropy_B, ids_BK, logprob_B.new_empty(num_rows, top_k)


LIBRARY.impl("topk_mixture_triton", _launch, "CompositeExplicitAutograd")


@torch.library.register_fake("fastlatent::topk_mixture_triton", lib=LIBRARY)
def _fake_launch(logits_BV, temperature, top_k, top_p, seed, counter_B3, greedy):
    return _empty_outputs(logits_BV, top_k)


def _supports(logits_BV, temperature, top_k, top_p, seed, counter_B3, greedy) -> str | None:
    return why_not_triton(logits_BV, seed, counter_B3)


@topk_mixture.backend("triton", supports=_supports)
@torch.no_grad()
def _run(logits_BV, temperature, top_k, top_p, seed, counter_B3, greedy):
    return TopkMixture(*torch.ops.fastlatent.topk_mixture_triton(
        logits_BV, temperature, top_k, top_p, seed, counter_B3, greedy))


_POINTERS = {"largest_ptr": "*fp32", "chunk_ptr": "*fp32"}
_SIZES = {"vocab_size": "i32", "num_tiles": "i32", "num_chunks": "i32"}
_OUTPUTS = {"seed_ptr": "*i64", "counter_ptr": "*i64", "token_ptr": "*i64", "logprob_ptr": "*fp32",
            "log_kept_ptr": "*fp32", "entropy_ptr": "*fp32", "ids_ptr": "*i64", "weights_ptr": "*fp32"}


def _aot(logits: str, label: str) -> tuple[Compile, ...]:
    types = {"logits_ptr": logits, "inv_temperature": "fp32"} | _POINTERS | _SIZES
    return (
        Compile(row_tiles_kernel, types, {"TC": TILES_PER_CHUNK}, unaligned=("num_tiles", "num_chunks"),
                requires=("LDG.E.128",), label=label),
        Compile(topk_mixture_kernel, types | _OUTPUTS | {"top_k": "i32", "top_p": "fp32"},
                {"GREEDY": False, "NUCLEUS": True, "NT": 2048, "NC": 64, "KP": 64}, num_warps=8,
                unaligned=("num_tiles", "num_chunks", "top_k"), label=label))


AOT = (*_aot("*bf16", ""), *_aot("*fp32", "float32"))
