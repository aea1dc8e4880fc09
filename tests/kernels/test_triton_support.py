"""What the Triton kernels share: noise equal to noise.py, and elementary functions as good as float32 allows."""

import pytest
import torch
import triton
import triton.language as tl
from fastlatent_kernels import noise, triton_support
from fastlatent_kernels.triton_support import (
    expm1, gumbel, log1p, noise_row, sigmoid, softplus, uniform, why_not_triton)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = tl.constexpr(1024)


@triton.jit
def draw_kernel(seed_ptr, counter_ptr, index_ptr, uniform_ptr, gumbel_ptr, stream: tl.constexpr):
    row = tl.program_id(0)
    key_lo, key_hi, position, prompt, sample_word = noise_row(seed_ptr, counter_ptr, row)
    at = tl.arange(0, SIZE)
    index = tl.load(index_ptr + at)
    tl.store(uniform_ptr + row * SIZE + at, uniform(key_lo, key_hi, index, position, stream, prompt, sample_word))
    tl.store(gumbel_ptr + row * SIZE + at, gumbel(key_lo, key_hi, index, position, stream, prompt, sample_word))


@triton.jit
def block_draw_kernel(seed_ptr, counter_ptr, uniform_ptr, stream: tl.constexpr):
    """Rows and indices as one block."""
    row = tl.arange(0, 4)
    key_lo, key_hi, position, prompt, sample_word = noise_row(seed_ptr, counter_ptr, row)
    index = tl.arange(0, SIZE)[None, :]
    drawn = uniform(key_lo, key_hi, index, position[:, None], stream, prompt[:, None], sample_word[:, None])
    tl.store(uniform_ptr + row[:, None] * SIZE + index, drawn)


@triton.jit
def function_kernel(x_ptr, out_ptr, WHICH: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + at)
    if WHICH == "sigmoid":
        y = sigmoid(x)
    elif WHICH == "softplus":
        y = softplus(x)
    elif WHICH == "log1p":
        y = log1p(x)
    else:
        y = expm1(x)
    tl.store(out_ptr + at, y)


SEEDS = [0, 5 + 2**35, -3 - 2**40, 2**63 - 1]
COUNTERS = torch.tensor([[0, 0, 0], [2**31 + 5, 2**32 - 1, 7 * 2**16 + 3], [1, 77, 2**32 - 1], [2**40 + 9, 3, 2]])


@pytest.mark.parametrize("stream", range(4))
@pytest.mark.parametrize("seed", SEEDS)
def test_noise_is_that_of_the_contract_bit_for_bit(seed, stream):
    seed, counter_B3 = torch.tensor(seed, device=DEVICE), COUNTERS.to(DEVICE)
    index = torch.randint(2**18, (SIZE.value,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    got, got_gumbel = (torch.empty(4, SIZE.value, device=DEVICE) for _ in range(2))
    draw_kernel[(4,)](seed, counter_B3, index, got, got_gumbel, stream)
    address = (seed, index, counter_B3[:, 0:1], stream, counter_B3[:, 1:2], counter_B3[:, 2:3])
    assert torch.equal(got, noise.uniform(*address))
    # the logarithms are the machine's own
    torch.testing.assert_close(got_gumbel, noise.gumbel(*address), rtol=1e-5, atol=1e-6)


def test_rows_may_be_a_block():
    seed, counter_B3 = torch.tensor(SEEDS[1], device=DEVICE), COUNTERS.to(DEVICE)
    got = torch.empty(4, SIZE.value, device=DEVICE)
    block_draw_kernel[(1,)](seed, counter_B3, got, noise.STREAM_LATENT)
    want = noise.uniform(seed, torch.arange(SIZE.value, device=DEVICE), counter_B3[:, 0:1], noise.STREAM_LATENT,
                         counter_B3[:, 1:2], counter_B3[:, 2:3])
    assert torch.equal(got, want)


@pytest.mark.parametrize(("name", "low", "high"), [("sigmoid", -80, 80), ("softplus", -80, 80), ("log1p", -0.99, 50),
                                                   ("expm1", -80, 80)])
def test_functions_keep_their_relative_precision(name, low, high):
    spread = torch.linspace(low, high, 2 * SIZE.value)
    tiny = torch.linspace(-1, 1, SIZE.value) * 10.0 ** -torch.linspace(0.01, 8, SIZE.value)  # where 1 + x rounds
    x = torch.cat([spread, tiny]).to(DEVICE)
    out = torch.empty_like(x)
    function_kernel[(3,)](x, out, name)
    exact = {"sigmoid": torch.sigmoid, "log1p": torch.log1p, "expm1": torch.expm1,
             "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x))}[name](x.double())
    # exp of an argument near 80 has a relative error of 80 roundings of that argument; a GPU's is the exp2 of the rounded
    # product with a rounded log2(e), which comes to 3.7e-6 at these arguments
    bound = 3e-6 if DEVICE == "cpu" else 5e-6
    assert ((out.double() - exact).abs() / exact.abs().clamp(min=1e-30)).max() < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_tensors_the_kernels_take(dtype):
    assert why_not_triton(torch.ones(2, dtype=dtype, device=DEVICE), None) is None


def test_tensors_the_kernels_refuse(monkeypatch):
    assert why_not_triton(torch.ones(2, device=DEVICE), torch.ones(2, dtype=torch.float64, device=DEVICE)) == \
        "triton takes float32, bfloat16 and float16 tensors"
    monkeypatch.setattr(triton_support, "INTERPRETED", False)
    assert why_not_triton(torch.ones(2)) == "triton takes CUDA tensors; TRITON_INTERPRET=1 runs it on a CPU, for tests"
