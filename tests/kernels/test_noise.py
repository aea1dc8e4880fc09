"""The noise contract: Philox against its published vectors and numpy, and draws by nothing but address."""

import numpy as np
import pytest
import torch
from fastlatent_kernels.noise import STREAM_ID, STREAM_TILE, gumbel, philox4x32, row_gumbel, uniform

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, result
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


def numpy_philox(counter, key):
    c0, c1, c2, c3 = (np.uint64(c) for c in counter)
    k0, k1 = (np.uint64(k) for k in key)
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> np.uint64(32)) ^ c1 ^ k0, p1 & low, (p0 >> np.uint64(32)) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return int(c0), int(c1), int(c2), int(c3)


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_gives_the_published_vectors(counter, key, result):
    words = philox4x32(tuple(map(torch.tensor, key)), tuple(map(torch.tensor, counter)))
    assert tuple(w.item() for w in words) == result == numpy_philox(counter, key)


def test_uniform_is_addressed_as_the_contract_says():
    rng = np.random.default_rng(0)
    seed = int(rng.integers(-2**63, 2**63, dtype=np.int64))
    index, position, prompt, sample_word = (rng.integers(0, 2**31, 50) for _ in range(4))
    prompt[0] = 2**32 - 1
    for stream in range(4):
        got = uniform(torch.tensor(seed), *(torch.from_numpy(x) for x in (index, position)), stream,
                      torch.from_numpy(prompt), torch.from_numpy(sample_word))
        for i in range(50):
            counter = index[i], (int(position[i]) * 4 + stream) % 2**32, prompt[i], sample_word[i]
            word = numpy_philox(counter, (seed % 2**32, (seed >> 32) % 2**32))[0]
            assert got[i].item() == ((word >> 9) + 0.5) / 2**23  # exact in float32
    assert got.dtype == torch.float32


def test_uniform_is_uniform_and_its_streams_differ():
    index = torch.arange(100_000)
    draws = [uniform(torch.tensor(1), index, torch.tensor(3), stream, torch.tensor(9), torch.tensor(65537))
             for stream in range(2)]
    for u in draws:
        counts = torch.histc(u, 50, 0, 1).double()
        assert ((counts - 2000) ** 2 / 2000).sum() < 95  # chi-square, 49 degrees of freedom: p = 1e-4
        assert 0 < u.min() and u.max() < 1
    assert abs(torch.corrcoef(torch.stack(draws))[0, 1]) < 0.015


def test_gumbel_has_its_law_and_follows_the_row_counter():
    counter_B3 = torch.tensor([[4, 7, 65536], [5, 7, 65536]])
    rows = row_gumbel(torch.tensor(2), torch.arange(100_000), STREAM_ID, counter_B3)
    assert abs(rows.mean() - 0.5772157) < 0.01 and abs(rows.var() - np.pi**2 / 6) < 0.03
    one = gumbel(torch.tensor(2), torch.tensor(17), torch.tensor(5), STREAM_ID, torch.tensor(7), torch.tensor(65536))
    assert torch.equal(rows[1, 17], one)
    assert not torch.equal(rows[0, :9], row_gumbel(torch.tensor(2), torch.arange(9), STREAM_TILE, counter_B3)[0])
