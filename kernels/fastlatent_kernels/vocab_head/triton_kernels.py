"""The kernels of vocab_head on a GPU.

`tiles_kernel` reads the weights once and leaves of every row and tile of 128 ids: the largest logit m, the sums of
e = exp(l - m), e**2 and e * (l - m), and e itself where the mixture is wanted. `draw_kernel` draws from these sums and
makes the logits of the drawn tile again, so the [B, V] logits are never stored. `mix_kernel` reads the embedding once,
and `sum_kernel` adds up its parts. Logits are in float32 and divided by the temperature throughout.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastlatent_kernels.noise import STREAM_ID, STREAM_TILE, TILE_SIZE
from fastlatent_kernels.triton_support import gumbel, noise_row

TILE, NOISE_TILE, NOISE_ID = tl.constexpr(TILE_SIZE), tl.constexpr(STREAM_TILE), tl.constexpr(STREAM_ID)
NUM_STATS = tl.constexpr(5)
"""Numbers per row and tile, as [B, NUM_STATS, tiles]: the four above, then exp(m - m of the row) / ||e of the row||."""


@triton.jit
def tiles_kernel(hidden_ptr, weight_ptr, stats_ptr, exps_ptr, B, V, D, num_tiles, inv_temperature,
                 KEEPS_EXPS: tl.constexpr, BLOCK_B: tl.constexpr, TILES: tl.constexpr, BLOCK_K: tl.constexpr):
    row_B = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    tile_C = tl.program_id(1) * TILES + tl.arange(0, TILES)
    first_id = tl.program_id(1) * TILES * TILE
    place_I = tl.arange(0, TILES * TILE)
    is_row_B, is_id_I = row_B < B, first_id + place_I < V

    hidden_ptr += row_B.to(tl.int64)[:, None] * D
    weight_ptr += first_id.to(tl.int64) * D  # V * D can pass 2**31
    logit_BI = tl.zeros([BLOCK_B, TILES * TILE], tl.float32)
    for begin in range(0, D, BLOCK_K):
        k_K = begin + tl.arange(0, BLOCK_K)
        hidden_BK = tl.load(hidden_ptr + k_K[None, :], mask=is_row_B[:, None] & (k_K < D)[None, :], other=0.0)
        weight_KI = tl.load(weight_ptr + place_I[None, :] * D + k_K[:, None],
                            mask=is_id_I[None, :] & (k_K < D)[:, None], other=0.0)
        logit_BI = tl.dot(hidden_BK, weight_KI, logit_BI, input_precision="ieee")

    logit_BI = tl.where(is_id_I[None, :], logit_BI * inv_temperature, -float("inf"))
    logit_BCJ = tl.reshape(logit_BI, [BLOCK_B, TILES, TILE])
    largest_BC = tl.max(logit_BCJ, axis=2)
    # a tile past the end, or of nothing but -inf: any finite shift makes its exps 0 instead of NaN
    x_BCJ = logit_BCJ - tl.where(largest_BC == -float("inf"), 0.0, largest_BC)[:, :, None]
    exp_BCJ = tl.exp(x_BCJ)
    inside_BC = is_row_B[:, None] & (tile_C < num_tiles)[None, :]
    at_BC = stats_ptr + row_B.to(tl.int64)[:, None] * NUM_STATS * num_tiles + tile_C[None, :]
    tl.store(at_BC, largest_BC, mask=inside_BC)
    tl.store(at_BC + num_tiles, tl.sum(exp_BCJ, axis=2), mask=inside_BC)
    tl.store(at_BC + 2 * num_tiles, tl.sum(exp_BCJ * exp_BCJ, axis=2), mask=inside_BC)
    tl.store(at_BC + 3 * num_tiles, tl.sum(tl.where(exp_BCJ > 0, x_BCJ, 0.0) * exp_BCJ, axis=2), mask=inside_BC)
    if KEEPS_EXPS:
        at_BI = exps_ptr + row_B.to(tl.int64)[:, None] * num_tiles * TILE + first_id + place_I[None, :]
        inside_BI = is_row_B[:, None] & (first_id + place_I < num_tiles * TILE)[None, :]
        exp_BI = tl.reshape(exp_BCJ, [BLOCK_B, TILES * TILE])
        tl.store(at_BI, exp_BI.to(exps_ptr.dtype.element_ty), mask=inside_BI)


@triton.jit
def draw_kernel(hidden_ptr, weight_ptr, stats_ptr, seed_ptr, counter_ptr, token_ptr, logprob_ptr, entropy_ptr, V, D,
                num_tiles, inv_temperature, GREEDY: tl.constexpr, NT: tl.constexpr, BLOCK_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tile_C = tl.arange(0, NT)
    is_tile_C = tile_C < num_tiles
    at_C = stats_ptr + row * NUM_STATS * num_tiles + tile_C
    largest_C = tl.load(at_C, mask=is_tile_C, other=-float("inf"))
    mass_C = tl.load(at_C + num_tiles, mask=is_tile_C, other=1.0)
    squares_C = tl.load(at_C + 2 * num_tiles, mask=is_tile_C, other=0.0)
    slope_C = tl.load(at_C + 3 * num_tiles, mask=is_tile_C, other=0.0)

    largest = tl.max(largest_C)
    x_C = largest_C - largest
    factor_C = tl.exp(x_C)
    log_mass = tl.log(tl.sum(mass_C * factor_C))  # relative to the likeliest token
    slope = tl.sum((slope_C + mass_C * tl.where(factor_C > 0, x_C, 0.0)) * factor_C)
    norm = tl.sqrt(tl.sum(squares_C * factor_C * factor_C))
    tl.store(entropy_ptr + row, log_mass - slope * tl.exp(-log_mass))
    tl.store(at_C + 4 * num_tiles, factor_C / norm, mask=is_tile_C)

    key_lo, key_hi, position, prompt, sample_word = noise_row(seed_ptr, counter_ptr, row)
    race_C = largest_C
    if not GREEDY:
        race_C += tl.log(mass_C) + gumbel(key_lo, key_hi, tile_C, position, NOISE_TILE, prompt, sample_word)
    first_id = tl.minimum(place_of_best(race_C), num_tiles - 1) * TILE

    id_J = first_id + tl.arange(0, TILE)
    logit_J = tile_logits(hidden_ptr + row * D, weight_ptr, id_J, V, D, BLOCK_K) * inv_temperature
    race_J = logit_J
    if not GREEDY:
        race_J += gumbel(key_lo, key_hi, id_J, position, NOISE_ID, prompt, sample_word)
    token = tl.minimum(first_id + place_of_best(tl.where(id_J < V, race_J, -float("inf"))), V - 1)
    logit = tl.sum(tl.where(id_J == token, logit_J, 0.0))
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(logprob_ptr + row, logit - largest - log_mass)


@triton.jit
def mix_kernel(exps_ptr, stats_ptr, embed_ptr, part_ptr, B, V, E, num_tiles, tiles_per_split,
               BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr):
    """part [splits, B, E]: p @ embed / ||p||_2 over the ids of one split."""
    row_B = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    column_E = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    place_J = tl.arange(0, TILE)
    is_row_B, is_column_E = row_B < B, column_E < E
    exps_ptr += row_B.to(tl.int64)[:, None] * num_tiles * TILE + place_J[None, :]
    factor_ptr = stats_ptr + (row_B.to(tl.int64) * NUM_STATS + NUM_STATS - 1) * num_tiles

    mixture_BE = tl.zeros([BLOCK_B, BLOCK_E], tl.float32)
    first_tile = tl.program_id(2) * tiles_per_split
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_split, num_tiles)):
        factor_B = tl.load(factor_ptr + tile, mask=is_row_B, other=0.0)
        exp_BJ = tl.load(exps_ptr + tile * TILE, mask=is_row_B[:, None], other=0.0).to(tl.float32)
        id_J = place_J + tile * TILE
        embed_JE = tl.load(embed_ptr + id_J.to(tl.int64)[:, None] * E + column_E[None, :],
                           mask=(id_J < V)[:, None] & is_column_E[None, :], other=0.0)
        unit_p_BJ = (exp_BJ * factor_B[:, None]).to(embed_ptr.dtype.element_ty)
        mixture_BE = tl.dot(unit_p_BJ, embed_JE, mixture_BE, input_precision="ieee")
    at_BE = part_ptr + (tl.program_id(2) * B + row_B).to(tl.int64)[:, None] * E + column_E[None, :]
    tl.store(at_BE, mixture_BE, mask=is_row_B[:, None] & is_column_E[None, :])


@triton.jit
def sum_kernel(part_ptr, mixture_ptr, size, num_splits, BLOCK: tl.constexpr):
    """Sum over the splits, in their order: torch.sum would choose another for another number of rows."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(num_splits):
        total += tl.load(part_ptr + at, mask=at < size, other=0.0)
        part_ptr += size
    tl.store(mixture_ptr + at, total.to(mixture_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def tile_logits(hidden_ptr, weight_ptr, id_J, V, D, BLOCK_K: tl.constexpr):
    """float32 hidden @ weight[id].T of one row; 0 for ids past the vocabulary."""
    logit_J = tl.zeros([TILE], tl.float32)
    weight_ptr += id_J.to(tl.int64)[:, None] * D
    for begin in tl.range(0, D, BLOCK_K, num_stages=3):
        k_K = begin + tl.arange(0, BLOCK_K)
        hidden_K = tl.load(hidden_ptr + k_K, mask=k_K < D, other=0.0).to(tl.float32)
        weight_JK = tl.load(weight_ptr + k_K[None, :], mask=(id_J < V)[:, None] & (k_K < D)[None, :], other=0.0)
        logit_J += tl.sum(weight_JK.to(tl.float32) * hidden_K[None, :], axis=1)
    return logit_J


@triton.jit
def place_of_best(race):
    """Lowest index of the largest; the last where all are NaN."""
    return tl.min(tl.where(race == tl.max(race), tl.arange(0, race.shape[0]), race.shape[0] - 1))
