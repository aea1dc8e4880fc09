"""The patched interpreter computes what a GPU would; of the unpatched one, every kernel here shows a fault."""

import pytest
import torch
import triton
import triton.language as tl
from interpreter import to_bfloat16

SIZE = tl.constexpr(64)
GENERATOR = torch.Generator().manual_seed(0)


@triton.jit
def copy_kernel(x_ptr, out_ptr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


@triton.jit
def dot_kernel(x_ptr, y_ptr, out_ptr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(x_ptr + at), tl.load(y_ptr + at), input_precision="ieee"))


@triton.jit
def loop_kernel(out_ptr, count):
    total = 0
    for i in range(count):
        total += i
    tl.store(out_ptr, total)


@triton.jit
def add_kernel(x_ptr, out_ptr):
    x = tl.load(x_ptr + tl.arange(0, SIZE))
    tl.store(out_ptr + tl.arange(0, SIZE), x + x)


@triton.jit
def less_kernel(x_ptr, out_ptr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(x_ptr + at) < tl.load(x_ptr + SIZE - 1 - at))


@triton.jit
def fma_kernel(x_ptr, out_ptr):
    x = tl.load(x_ptr + tl.arange(0, SIZE))
    tl.store(out_ptr + tl.arange(0, SIZE), tl.fma(x, x, x))


@triton.jit
def clamp_kernel(x_ptr, out_ptr):
    x = tl.load(x_ptr + tl.arange(0, SIZE))
    tl.store(out_ptr + tl.arange(0, SIZE), tl.minimum(tl.maximum(x, -1.0), 1.0))


@triton.jit
def sum_kernel(x_ptr, out_ptr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, SIZE)), axis=0))


def test_stores_round_as_torch_does():
    x = torch.randn(SIZE.value, generator=GENERATOR)
    x[:6] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, 1 + 2**-8, 1 + 3 * 2**-8])  # two ties among them
    out = torch.empty(SIZE.value, dtype=torch.bfloat16)
    copy_kernel[(1,)](x, out)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    back = torch.empty(SIZE.value)
    copy_kernel[(1,)](out, back)
    torch.testing.assert_close(back, out.float(), rtol=0, atol=0, equal_nan=True)


def test_dots_multiply_values():
    x, y = (torch.randn(16, 16, generator=GENERATOR).bfloat16() for _ in range(2))
    out = torch.empty(16, 16)
    dot_kernel[(1,)](x, y, out)
    torch.testing.assert_close(out.double(), x.double() @ y.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("error")
def test_loops_take_a_number_known_at_run_time():
    out = torch.zeros(1, dtype=torch.int32)
    loop_kernel[(1,)](out, 7)
    assert out.item() == 21


def test_a_bound_hides_a_nan():
    x, out = torch.linspace(-2, 2, SIZE.value), torch.empty(SIZE.value)
    x[3] = torch.nan
    clamp_kernel[(1,)](x, out)
    assert torch.equal(out, x.nan_to_num(-1.0).clamp(-1, 1))


@pytest.mark.parametrize("kernel", [add_kernel, less_kernel, fma_kernel, sum_kernel])
def test_arithmetic_on_bits_raises(kernel):
    x = torch.ones(SIZE.value, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="works on bits"):
        kernel[(1,)](x, torch.empty(SIZE.value))


def test_rounding_equals_torch_on_every_exponent():
    x = torch.randint(-(2**31), 2**31, (10_000,), generator=GENERATOR, dtype=torch.int32).view(torch.float32)
    bits = torch.from_numpy(to_bfloat16(x.numpy()).view("int16")).view(torch.bfloat16)
    torch.testing.assert_close(bits, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
