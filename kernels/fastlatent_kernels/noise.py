"""The noise of a rollout: Philox4x32-10 (Salmon et al., SC 2011) addressed by what is drawn and nothing else.

Key: the 64-bit run seed. Counter: (index, position * 4 + stream, prompt id, step * 2**16 + sample), four 32-bit words.
So a token's noise is the same whatever it is batched with, in every backend and engine, and nothing is stored or
restored.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_SIZE = 128
"""Ids in one tile of two-level sampling; part of the definition of a draw, whatever a kernel's own tiles are."""

STREAM_TILE, STREAM_ID, STREAM_LATENT, STREAM_STOP = range(4)
"""What a random number decides: the vocabulary tile (index: tile), the id inside it (index: vocabulary id), latent
noise (index: id or dimension), the end of a latent block."""

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32 over int64 tensors that hold 32-bit words; shapes broadcast."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: Tensor, index: Tensor, position: Tensor, stream: int, prompt: Tensor, sample_word: Tensor) -> Tensor:
    """Uniform numbers ((r >> 9) + 0.5) * 2**-23 in (0, 1), exact in float32, r the first word Philox returns.

    Args:
        seed: int64 scalar tensor, all 64 bits count.
        index, position, prompt, sample_word: int64 tensors that broadcast; `sample_word` is step * 2**16 + sample.
    """
    counter = (index & _MASK, (position * 4 + stream) & _MASK, prompt & _MASK, sample_word & _MASK)
    word = philox4x32((seed & _MASK, (seed >> 32) & _MASK), counter)[0]
    return ((word >> 9).float() + 0.5) * 2.0**-23


def gumbel(seed: Tensor, index: Tensor, position: Tensor, stream: int, prompt: Tensor, sample_word: Tensor) -> Tensor:
    """Standard Gumbel noise -log(-log u), float32, of `uniform` with the same arguments."""
    return -torch.log(-torch.log(uniform(seed, index, position, stream, prompt, sample_word)))


def normal(seed: Tensor, index: Tensor, position: Tensor, stream: int, prompt: Tensor, sample_word: Tensor) -> Tensor:
    """Standard normal noise, float32, of `uniform` with the same arguments: the inverse distribution function at u.

    One u per normal, so that a dimension's noise depends on its own address alone (Box-Muller would tie it to a
    neighbour's); 2**23 values, the outermost at +-5.29.
    """
    # float64 inside rounds once: the definition that backends approximate
    return torch.special.ndtri(uniform(seed, index, position, stream, prompt, sample_word).double()).float()


def row_gumbel(seed: Tensor, index: Tensor, stream: int, counter_B3: Tensor) -> Tensor:
    """`gumbel` of rows whose counters are (position, prompt id, step * 2**16 + sample); `index` is [n] or [B, n]."""
    position, prompt, sample_word = counter_B3[:, 0:1], counter_B3[:, 1:2], counter_B3[:, 2:3]
    return gumbel(seed, index, position, stream, prompt, sample_word)


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product of two 32-bit words."""
    # the product with multiplier - 2**32 fits a signed int64 and has the same low word; its high word lacks `word`
    product = word * (multiplier - (1 << 32))
    return word + (product >> 32), product & _MASK
