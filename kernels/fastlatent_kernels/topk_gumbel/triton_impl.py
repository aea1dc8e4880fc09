"""topk_gumbel on a GPU: one pass over the logits, the end of the candidates, then noise for those that can win."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fastlatent_kernels.aot import Compile
from fastlatent_kernels.library import LIBRARY
from fastlatent_kernels.noise import STREAM_LATENT, TILE_SIZE
from fastlatent_kernels.topk_gumbel import ClippedGumbel, TopkGumbel, topk_gumbel
from fastlatent_kernels.topk_gumbel.candidates import candidates_kernel
from fastlatent_kernels.topk_mixture.row_topk import (
    NO_KEY, TILE, TILES_PER_CHUNK, best_tiles, id_of, key_of, largest_keys, load_logits, padded, row_tiles, value_of)
from fastlatent_kernels.triton_support import gumbel, noise_row, why_not_triton

NOISE = tl.constexpr(STREAM_LATENT)
NOISY_TILES = 8  # tiles one program of noisy_tiles_kernel scores
CANDIDATE_WARPS = 8  # with 16, 64 candidates of float32 logits spill on sm_100
# low bits that are the same in every float32 made of this dtype
SAME_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


@triton.jit
def noisy_tiles_kernel(logits_ptr, largest_ptr, floor_ptr, lse_ptr, seed_ptr, counter_ptr, best_ptr, vocab_size,
                       num_tiles, inv_temperature, low, high, shift, scale, TC: tl.constexpr):
    """The best noisy score of each tile; tiles without a survivor draw no noise."""
    row = tl.program_id(0).to(tl.int64)
    tile_C = tl.program_id(1) * TC + tl.arange(0, TC)
    at_C = row * num_tiles + tile_C
    largest = tl.max(tl.load(largest_ptr + at_C, mask=tile_C < num_tiles, other=-float("inf")))
    best_C = tl.full([TC], float("-inf"), tl.float32)
    if key_of(largest, 0) >= tl.load(floor_ptr + row):
        id_CJ = tile_C[:, None] * TILE + tl.arange(0, TILE)[None, :]
        score_CJ = noisy_scores(logits_ptr, floor_ptr, lse_ptr, seed_ptr, counter_ptr, row, id_CJ, vocab_size,
                                inv_temperature, low, high, shift, scale)
        best_C = tl.max(score_CJ, axis=1)
    tl.store(best_ptr + at_C, best_C, mask=tile_C < num_tiles)


@triton.jit
def winners_kernel(logits_ptr, best_ptr, floor_ptr, lse_ptr, seed_ptr, counter_ptr, ids_ptr, score_ptr, logprob_ptr,
                   weights_ptr, vocab_size, num_tiles, top_k, inv_temperature, inv_mixture_temperature, low, high,
                   shift, scale, NT: tl.constexpr, KP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tile_K = best_tiles(best_ptr, row, num_tiles, top_k, NT, KP).to(tl.int32)
    id_KJ = tile_K[:, None] * TILE + tl.arange(0, TILE)[None, :]
    score_KJ = noisy_scores(logits_ptr, floor_ptr, lse_ptr, seed_ptr, counter_ptr, row, id_KJ, vocab_size,
                            inv_temperature, low, high, shift, scale)
    key_K = largest_keys(tl.where(id_KJ < vocab_size, key_of(score_KJ, id_KJ), NO_KEY), top_k, KP)

    place_K = tl.arange(0, KP)
    is_kept_K = place_K < top_k
    id_K = tl.where(is_kept_K, id_of(key_K), 0)
    score_K = tl.where(is_kept_K, value_of(key_K), -float("inf"))
    logit_K = load_logits(logits_ptr, row, id_K, is_kept_K, vocab_size)
    weight_K = tl.exp((score_K - tl.max(score_K)) * inv_mixture_temperature)
    at_K = row * top_k + place_K
    tl.store(ids_ptr + at_K, id_K, mask=is_kept_K)
    lse = tl.load(lse_ptr + row)
    tl.store(score_ptr + at_K, score_K + (lse - lse), mask=is_kept_K)  # a row with a NaN shows it
    tl.store(logprob_ptr + at_K, logit_K * inv_temperature - lse, mask=is_kept_K)
    tl.store(weights_ptr + at_K, weight_K / tl.sum(weight_K), mask=is_kept_K)


@triton.jit
def noisy_scores(logits_ptr, floor_ptr, lse_ptr, seed_ptr, counter_ptr, row, id, vocab_size, inv_temperature,
                 low, high, shift, scale):
    """log-probability + noise of ids (a block), -inf for those below the floor."""
    logit = load_logits(logits_ptr, row, id, id < vocab_size, vocab_size)
    key_lo, key_hi, position, prompt, sample_word = noise_row(seed_ptr, counter_ptr, row)
    g = gumbel(key_lo, key_hi, id, position, NOISE, prompt, sample_word)
    noise = scale * (tl.minimum(tl.maximum(g, low), high) + shift)
    survives = (key_of(logit, id) >= tl.load(floor_ptr + row)) & (logit > -float("inf"))
    return tl.where(survives, logit * inv_temperature - tl.load(lse_ptr + row) + noise, -float("inf"))


LIBRARY.define("topk_gumbel_triton(Tensor logits, float temperature, int top_k, float top_p, float[] noise, "
               "float mixture_temperature, Tensor seed, Tensor counter) "
               "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")


def _launch(logits_BV, temperature, top_k, top_p, noise, mixture_temperature, seed, counter_B3):
    logits_BV, counter_B3 = logits_BV.contiguous(), counter_B3.contiguous()
    out = _empty_outputs(logits_BV, top_k)
    ids_BK, score_BK, logprob_BK, weights_BK, likeliest_B, log_kept_B, num_candidates_B, entropy_B = out
    num_rows, vocab_size = logits_BV.shape
    tiles = row_tiles(logits_BV, temperature)
    num_tiles, num_chunks = tiles.largest_BC.shape[1], tiles.chunk_B3N.shape[2]
    floor_B, lse_B = torch.empty_like(likeliest_B), torch.empty_like(entropy_B)
    low, high, shift, scale = noise
    width = scale * (high - low) if scale else 0.0  # 0 times an infinite width is 0 here
    # 0.01: a lower bound whatever is rounded
    log_rest = math.log((1 - top_p) / vocab_size) - 0.01 if top_p < 1 else 0.0
    candidates_kernel[(num_rows,)](
        logits_BV, tiles.largest_BC, tiles.chunk_B3N, floor_B, lse_B, likeliest_B, log_kept_B, num_candidates_B,
        entropy_B, vocab_size, num_tiles, num_chunks, top_k, top_p, log_rest, width, temperature,
        SHIFT=SAME_BITS[logits_BV.dtype], NUCLEUS=top_p < 1, CHUNK=tiles.tiles_per_chunk * TILE_SIZE,
        NT=padded(num_tiles), NC=padded(num_chunks), KP=padded(top_k), num_warps=CANDIDATE_WARPS)

    best_BC = torch.empty_like(tiles.largest_BC)
    tiles_per_program = min(NOISY_TILES, triton.next_power_of_2(num_tiles))
    noisy_tiles_kernel[(num_rows, triton.cdiv(num_tiles, tiles_per_program))](
        logits_BV, tiles.largest_BC, floor_B, lse_B, seed, counter_B3, best_BC, vocab_size, num_tiles,
        1.0 / temperature, low, high, shift, scale, TC=tiles_per_program, num_warps=4)
    winners_kernel[(num_rows,)](
        logits_BV, best_BC, floor_B, lse_B, seed, counter_B3, ids_BK, score_BK, logprob_BK, weights_BK, vocab_size,
        num_tiles, top_k, 1.0 / temperature, 1.0 / mixture_temperature, low, high, shift, scale,
        NT=padded(num_tiles), KP=padded(top_k), num_warps=winner_warps(top_k))
    return out


def winner_warps(top_k: int) -> int:
    """Eight to sixteen numbers a thread: the noise of more would not fit its registers."""
    return min(16, padded(top_k) // 4)


def _empty_outputs(logits_BV, top_k):
    num_rows, device = logits_BV.shape[0], logits_BV.device
    ids_BK = torch.empty(num_rows, top_k, dtype=torch.int64, device=device)
    log_kept_B, entropy_B = (torch.empty(num_rows, dtype=torch.float32, device=device) for _ in range(2))
    score_BK, logprob_BK, weights_BK = (log_kept_B.new_empty(num_rows, top_k) for _ in range(3))
    likeliest_B, num_candidates_B = (torch.empty(num_rows, dtype=torch.int64, device=device) for _ in range(2))
    return ids_BK, score_BK, logprob_BK, weights_BK, likeliest_B, log_kept_B, num_candidates_B, entropy_B


LIBRARY.impl("topk_gumbel_triton", _launch, "CompositeExplicitAutograd")


@torch.library.register_fake("fastlatent::topk_gumbel_triton", lib=LIBRARY)
def _fake_launch(logits_BV, temperature, top_k, top_p, noise, mixture_temperature, seed, counter_B3):
    return _empty_outputs(logits_BV, top_k)


def _supports(logits_BV, temperature, top_k, top_p, noise: ClippedGumbel, mixture_temperature, seed,
              counter_B3) -> str | None:
    return why_not_triton(logits_BV, seed, counter_B3)


@topk_gumbel.backend("triton", supports=_supports)
@torch.no_grad()
def _run(logits_BV, temperature, top_k, top_p, noise, mixture_temperature, seed, counter_B3):
    return TopkGumbel(*torch.ops.fastlatent.topk_gumbel_triton(
        logits_BV, temperature, top_k, top_p, list(noise), mixture_temperature, seed, counter_B3))


_TILES = {"largest_ptr": "*fp32", "vocab_size": "i32", "num_tiles": "i32"}
_NOISE = {"floor_ptr": "*i64", "lse_ptr": "*fp32", "seed_ptr": "*i64", "counter_ptr": "*i64", "best_ptr": "*fp32",
          "inv_temperature": "fp32", "low": "fp32", "high": "fp32", "shift": "fp32", "scale": "fp32"}
_CANDIDATES = {"chunk_ptr": "*fp32", "floor_ptr": "*i64", "lse_ptr": "*fp32", "likeliest_ptr": "*i64",
               "log_kept_ptr": "*fp32", "num_candidates_ptr": "*i64", "entropy_ptr": "*fp32", "num_chunks": "i32",
               "top_k": "i32", "top_p": "fp32", "log_rest": "fp32", "noise_width": "fp32", "temperature": "fp32"}
_WINNERS = {"vocab_size": "i32", "num_tiles": "i32", "top_k": "i32", "ids_ptr": "*i64", "score_ptr": "*fp32",
            "logprob_ptr": "*fp32", "weights_ptr": "*fp32", "inv_mixture_temperature": "fp32"}


def _aot(logits: dict[str, str], shift: int, top_k: int, label: str) -> tuple[Compile, ...]:
    blocks = {"NT": 2048, "KP": padded(top_k)}
    return (
        Compile(candidates_kernel, logits | _TILES | _CANDIDATES,
                blocks | {"SHIFT": shift, "NUCLEUS": True, "CHUNK": TILES_PER_CHUNK * TILE_SIZE, "NC": 64},
                num_warps=CANDIDATE_WARPS, unaligned=("num_tiles", "num_chunks", "top_k"), label=label),
        Compile(winners_kernel, logits | _WINNERS | _NOISE, blocks, num_warps=winner_warps(top_k),
                unaligned=("num_tiles", "top_k"), label=label))


_HALF, _FLOAT = {"logits_ptr": "*bf16"}, {"logits_ptr": "*fp32"}
AOT = (
    *_aot(_HALF, 16, 10, ""), *_aot(_FLOAT, 0, 10, "float32"), *_aot(_HALF, 16, 64, "64"),
    *_aot(_FLOAT, 0, 64, "float32 64"),
    *(Compile(noisy_tiles_kernel, logits | _TILES | _NOISE, {"TC": NOISY_TILES}, unaligned=("num_tiles",), label=label)
      for logits, label in ((_HALF, ""), (_FLOAT, "float32"))),
)
