"""The k largest of a row without sorting it, for the Triton backends of topk_mixture and topk_gumbel.

A first kernel reads the row once and leaves the largest of every tile of 128 ids. The k largest of a row lie in the k
tiles whose largest is best, so a second one reads no more than those tiles. Order is total and exact: the larger value,
then the lower id, as one int64 key.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlatent_kernels.noise import TILE_SIZE

TILE: tl.constexpr = tl.constexpr(TILE_SIZE)
NO_KEY: tl.constexpr = tl.constexpr(-(2**63))  # below the key of every value
TILES_PER_CHUNK = 32  # tiles one program of a row-parallel kernel reads: 4096 logits


class RowTiles(NamedTuple):
    """A row of logits in numbers: `largest_BC` of each tile; of each chunk of tiles, `chunk_B3N`: its largest logit m,
    the sum of exp((l - m) / T) and that of exp((l - m) / T) * (l - m) / T."""

    largest_BC: Tensor
    chunk_B3N: Tensor
    tiles_per_chunk: int


def row_tiles(logits_BV: Tensor, temperature: float) -> RowTiles:
    """Read every row once."""
    num_rows, vocab_size = logits_BV.shape
    num_tiles = triton.cdiv(vocab_size, TILE_SIZE)
    tiles_per_chunk = min(TILES_PER_CHUNK, triton.next_power_of_2(num_tiles))
    num_chunks = triton.cdiv(num_tiles, tiles_per_chunk)
    largest_BC = torch.empty(num_rows, num_tiles, dtype=torch.float32, device=logits_BV.device)
    chunk_B3N = torch.empty(num_rows, 3, num_chunks, dtype=torch.float32, device=logits_BV.device)
    row_tiles_kernel[(num_rows, num_chunks)](
        logits_BV, largest_BC, chunk_B3N, vocab_size, num_tiles, num_chunks, 1.0 / temperature,
        TC=tiles_per_chunk, num_warps=4)
    return RowTiles(largest_BC, chunk_B3N, tiles_per_chunk)


def padded(size: int) -> int:
    """Elements of a block that holds `size`."""
    return max(16, triton.next_power_of_2(size))


@triton.jit
def row_tiles_kernel(logits_ptr, largest_ptr, chunk_ptr, vocab_size, num_tiles, num_chunks, inv_temperature,
                     TC: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tile_C = chunk * TC + tl.arange(0, TC)
    id_CJ = tile_C[:, None] * TILE + tl.arange(0, TILE)[None, :]
    logit_CJ = load_logits(logits_ptr, row, id_CJ, id_CJ < vocab_size, vocab_size)
    largest_C = tl.max(logit_CJ, axis=1)
    tl.store(largest_ptr + row * num_tiles + tile_C, largest_C, mask=tile_C < num_tiles)

    largest = tl.max(largest_C)
    # a chunk of nothing but -inf: any finite shift makes its exps 0 instead of NaN
    x_CJ = (logit_CJ - tl.where(largest == -float("inf"), 0.0, largest)) * inv_temperature
    exp_CJ = tl.exp(x_CJ)
    at = chunk_ptr + row * 3 * num_chunks + chunk
    tl.store(at, largest)
    tl.store(at + num_chunks, tl.sum(tl.sum(exp_CJ, axis=1)))
    tl.store(at + 2 * num_chunks, tl.sum(tl.sum(tl.where(exp_CJ > 0, exp_CJ * x_CJ, 0.0), axis=1)))


@triton.jit
def load_logits(logits_ptr, row, id, mask, vocab_size):
    """float32 logits of one row, -inf where masked; `row` is int64, for rows * V passes 2**31."""
    return tl.load(logits_ptr + row * vocab_size + id, mask=mask, other=-float("inf")).to(tl.float32)


@triton.jit
def row_softmax(chunk_ptr, row, num_chunks, inv_temperature, NC: tl.constexpr):
    """(largest logit, sum of exp((l - largest) / T), entropy) of a row."""
    chunk_N = tl.arange(0, NC)
    at_N, is_chunk_N = chunk_ptr + row * 3 * num_chunks + chunk_N, chunk_N < num_chunks
    largest_N = tl.load(at_N, mask=is_chunk_N, other=-float("inf"))
    mass_N = tl.load(at_N + num_chunks, mask=is_chunk_N, other=0.0)
    slope_N = tl.load(at_N + 2 * num_chunks, mask=is_chunk_N, other=0.0)
    largest = tl.max(largest_N)
    x_N = (largest_N - largest) * inv_temperature
    factor_N = tl.exp(x_N)
    mass = tl.sum(mass_N * factor_N)
    slope = tl.sum(tl.where(factor_N > 0, (slope_N + mass_N * x_N) * factor_N, 0.0))
    return largest, mass, tl.log(mass) - slope / mass


@triton.jit
def best_tiles(largest_ptr, row, num_tiles, k, NT: tl.constexpr, KP: tl.constexpr):
    """int64 [KP]: the k tiles that hold the k largest of a row, best first; past the end where there are fewer."""
    tile_C = tl.arange(0, NT)
    largest_C = tl.load(largest_ptr + row * num_tiles + tile_C, mask=tile_C < num_tiles, other=-float("inf"))
    key_K = largest_keys(tl.where(tile_C < num_tiles, key_of(largest_C, tile_C), NO_KEY), k, KP)
    return tl.where(key_K == NO_KEY, num_tiles, id_of(key_K))


@triton.jit
def largest_keys(keys, k, KP: tl.constexpr):
    """The k largest of distinct keys, largest first, in a block of KP; NO_KEY in the rest."""
    place_K = tl.arange(0, KP)
    key_K = tl.full([KP], NO_KEY, tl.int64)
    for place in range(k):
        best = tl.max(keys)
        key_K = tl.where(place_K == place, best, key_K)
        keys = tl.where(keys == best, NO_KEY, keys)
    return key_K


@triton.jit
def key_of(value, id):
    """int64 keys in the order (larger value, lower id)."""
    return (ordered(value).to(tl.int64) << 32) | (0x7FFFFFFF - id)


@triton.jit
def id_of(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    return from_ordered((key >> 32).to(tl.int32))


@triton.jit
def ordered(value):
    """int32 in the order of the floats; -0.0 and 0.0 are equal."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered(word):
    return (word ^ ((word >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
