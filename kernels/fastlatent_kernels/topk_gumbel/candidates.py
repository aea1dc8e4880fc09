"""Where the candidates of a row end, for the Triton backend of topk_gumbel.

Candidates are a prefix of the row in the order of its keys (row_topk.py): the k likeliest or the nucleus, whichever is
longer. The nucleus ends where the mass above a logit stops being less than top_p, which bisection over the logits' bits
finds; a chunk whose largest logit is not above the threshold is not read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastlatent_kernels.topk_mixture.row_topk import (
    NO_KEY,
    TILE,
    best_tiles,
    from_ordered,
    id_of,
    key_of,
    largest_keys,
    load_logits,
    ordered,
    row_softmax,
    value_of,
)


@triton.jit
def candidates_kernel(
        logits_ptr, largest_ptr, chunk_ptr, floor_ptr, lse_ptr, likeliest_ptr, log_kept_ptr, num_candidates_ptr,
        entropy_ptr, vocab_size, num_tiles, num_chunks, top_k, top_p, log_rest, noise_width, temperature,
        SHIFT: tl.constexpr, NUCLEUS: tl.constexpr, CHUNK: tl.constexpr, NT: tl.constexpr, NC: tl.constexpr,
        KP: tl.constexpr):
    """floor: the least key of a candidate that can win; log_rest: log((1 - top_p) / V), or less."""
    row = tl.program_id(0).to(tl.int64)
    inv_temperature = 1.0 / temperature
    likeliest, mass, entropy = row_softmax(chunk_ptr, row, num_chunks, inv_temperature, NC)
    log_mass = tl.log(mass)
    chunk_ptr += row * 3 * num_chunks  # of which only the largest logits are read from here on

    tile_K = best_tiles(largest_ptr, row, num_tiles, top_k, NT, KP)
    id_KJ = tile_K[:, None] * TILE + tl.arange(0, TILE)[None, :]
    is_id_KJ = id_KJ < vocab_size
    logit_KJ = load_logits(logits_ptr, row, id_KJ, is_id_KJ, vocab_size)
    key_K = largest_keys(tl.where(is_id_KJ, key_of(logit_KJ, id_KJ), NO_KEY), top_k, KP)
    last_key = tl.sum(tl.where(tl.arange(0, KP) == top_k - 1, key_K, 0))
    last_value = value_of(last_key)

    threshold = tl.full((), float("-inf"), tl.float32)
    above, share, wanted_ties = mass, 0.0, 0
    if NUCLEUS:
        lowest = likeliest + (log_mass + log_rest) * temperature
        threshold, above = nucleus_end(logits_ptr, chunk_ptr, row, vocab_size, num_chunks, likeliest, top_p * mass,
                                       lowest, inv_temperature, SHIFT, CHUNK)
        share = tl.exp((threshold - likeliest) * inv_temperature)
        wanted_ties = tl.minimum(tl.ceil((top_p * mass - above) / share), vocab_size * 1.0).to(tl.int32)
    num_above, num_ties, last_id = count_kept(logits_ptr, chunk_ptr, row, vocab_size, num_chunks, threshold,
                                              wanted_ties, CHUNK)
    floor = key_of(threshold, last_id)
    num_kept, kept = num_above + num_ties, above + num_ties * share
    if num_kept < top_k:
        value_K = value_of(key_K)
        is_allowed_K = value_K > -float("inf")  # NO_KEY gives a NaN, which is not
        floor = last_key
        num_kept = tl.sum(is_allowed_K.to(tl.int32))
        kept = tl.sum(tl.where(is_allowed_K, tl.exp((value_K - likeliest) * inv_temperature), 0.0))

    # room for rounding: pruning stays exact, for what it keeps beyond need still has to win
    room = 1e-5 * (tl.abs(likeliest) + tl.abs(last_value) + (16.0 + noise_width) * temperature)
    least_value = tl.where(last_value == -float("inf"), last_value, last_value - noise_width * temperature - room)
    tl.store(floor_ptr + row, tl.maximum(floor, key_of(least_value, 0x7FFFFFFF)))
    tl.store(lse_ptr + row, likeliest * inv_temperature + log_mass)
    tl.store(likeliest_ptr + row, id_of(tl.max(key_K)))
    log_kept = tl.log(kept) - log_mass
    # a comparison and not tl.minimum, which loses a NaN
    tl.store(log_kept_ptr + row, tl.where(log_kept > 0.0, 0.0, log_kept))
    tl.store(num_candidates_ptr + row, num_kept)
    tl.store(entropy_ptr + row, entropy)


@triton.jit
def nucleus_end(logits_ptr, chunk_largest_ptr, row, vocab_size, num_chunks, likeliest, wanted, lowest, inv_temperature,
                SHIFT: tl.constexpr, CHUNK: tl.constexpr):
    """The least logit with less than `wanted` mass above it, and that mass."""
    # logits of 16 bits as float32 end in SHIFT equal bits, and are searched without them
    high = (ordered(likeliest) >> SHIFT).to(tl.int64)
    low = (ordered(lowest) >> SHIFT).to(tl.int64) - 1
    above = 0.0
    while high - low > 1:
        middle = (low + high) >> 1
        mass = mass_above(logits_ptr, chunk_largest_ptr, row, vocab_size, num_chunks, searched(middle, SHIFT),
                          likeliest, inv_temperature, CHUNK)
        if mass < wanted:
            high, above = middle, mass
        else:
            low = middle
    return searched(high, SHIFT), above


@triton.jit
def searched(word, SHIFT: tl.constexpr):
    """The logit whose order, without its SHIFT last bits, is `word`."""
    return from_ordered(((word << SHIFT) | tl.where(word < 0, (1 << SHIFT) - 1, 0)).to(tl.int32))


@triton.jit
def mass_above(logits_ptr, chunk_largest_ptr, row, vocab_size, num_chunks, threshold, likeliest, inv_temperature,
               CHUNK: tl.constexpr):
    """Sum of exp((l - likeliest) / T) over the logits above the threshold."""
    mass = 0.0
    for chunk in range(num_chunks):
        if tl.load(chunk_largest_ptr + chunk) > threshold:
            id_J = chunk * CHUNK + tl.arange(0, CHUNK)
            logit_J = load_logits(logits_ptr, row, id_J, id_J < vocab_size, vocab_size)
            exp_J = tl.exp((logit_J - likeliest) * inv_temperature)
            mass += tl.sum(tl.where(logit_J > threshold, exp_J, 0.0))
    return mass


@triton.jit
def count_kept(logits_ptr, chunk_largest_ptr, row, vocab_size, num_chunks, threshold, wanted_ties, CHUNK: tl.constexpr):
    """Logits above the threshold, of those equal to it the first `wanted_ties`, and the id of the last of these."""
    num_above, num_ties, last_id = 0, 0, 0
    for chunk in range(num_chunks):
        if tl.load(chunk_largest_ptr + chunk) >= threshold:
            id_J = chunk * CHUNK + tl.arange(0, CHUNK)
            logit_J = load_logits(logits_ptr, row, id_J, id_J < vocab_size, vocab_size)
            is_tie_J = (logit_J == threshold).to(tl.int32)
            is_kept_J = (is_tie_J > 0) & (num_ties + tl.cumsum(is_tie_J, 0) <= wanted_ties)
            num_above += tl.sum((logit_J > threshold).to(tl.int32))
            num_ties += tl.sum(is_kept_J.to(tl.int32))
            last_id = tl.maximum(last_id, tl.max(tl.where(is_kept_J, id_J, 0)))
    return num_above, num_ties, last_id
