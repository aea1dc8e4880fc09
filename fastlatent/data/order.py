"""The order of prompts: an endless stream of epochs, each a permutation of all examples that follows from the seed.

Position p belongs to epoch p // n. Within an epoch, place j holds example F(j), where F is a Feistel network keyed by
(seed, epoch): a permutation that is evaluated one place at a time, so that nothing is shuffled, stored or restored,
and the millionth position of a procedural dataset costs what the first does.
"""

from __future__ import annotations

from hashlib import blake2b

ROUNDS = 8  # 4 give a pseudo-random permutation (Luby and Rackoff); tiny halves want more


def prompt_indices(num_examples: int, seed: int, start: int, count: int) -> list[int]:
    """Example indices at positions `start` to `start + count - 1` of the stream.

    Each run of `num_examples` positions from a multiple of it holds every index once; across that border an index may
    come again soon. The same on every machine and in every Python.
    """
    indices = []
    for position in range(start, start + count):
        epoch, place = divmod(position, num_examples)
        # hashed, because blake2b takes keys of at most 64 bytes and a seed may have any number of digits
        indices.append(_permute(place, num_examples, blake2b(b"%d %d" % (seed, epoch)).digest()))
    return indices


def _permute(place: int, size: int, key: bytes) -> int:
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    while True:
        place = _feistel(place, half_bits, key)
        # cycle walking: the network permutes 2**(2 * half_bits) >= size numbers; walking on from one outside leads
        # back inside along the cycle, which keeps it a permutation of the numbers below `size`; under 4 walks on
        # average
        if place < size:
            return place


def _feistel(number: int, half_bits: int, key: bytes) -> int:
    mask = (1 << half_bits) - 1
    left, right = number >> half_bits, number & mask
    for round_ in range(ROUNDS):
        mixed = blake2b(b"%d %d" % (round_, right), key=key, digest_size=8).digest()
        left, right = right, left ^ (int.from_bytes(mixed) & mask)
    return left << half_bits | right

