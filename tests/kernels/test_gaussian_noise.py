"""Normal noise: its law, its address, and how near Triton's approximation is to the definition."""

import math

import torch
import triton
import triton.language as tl
from fastlatent_kernels import gaussian_reparam
from fastlatent_kernels.gaussian_reparam.triton_kernels import inverse_normal
from fastlatent_kernels.noise import STREAM_LATENT, normal, uniform

SEED = torch.tensor(-77)


@triton.jit
def inverse_kernel(u_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, inverse_normal(tl.load(u_ptr + i)))


def noise(num_positions, width, backend="reference"):
    """eps as the op draws it: z of a standard posterior."""
    zeros = torch.zeros(num_positions, width)
    counter_T3 = torch.stack([torch.arange(num_positions), torch.full([num_positions], 5),
                              torch.full([num_positions], 65536 * 3 + 1)], dim=1)
    return gaussian_reparam(zeros, zeros, seed=SEED, counter_T3=counter_T3, backend=backend).z_TD


def test_noise_is_addressed_as_the_contract_says():
    eps_TD = noise(4, 9)
    u = uniform(SEED, torch.tensor(7), torch.tensor(2), STREAM_LATENT, torch.tensor(5), torch.tensor(65536 * 3 + 1))
    assert math.isclose(0.5 * math.erfc(-eps_TD[2, 7].item() / math.sqrt(2)), u.item(), rel_tol=1e-6)


def test_noise_is_standard_normal():
    eps = noise(200, 1000).flatten().double()
    n = eps.numel()
    moments = {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96), 6: (15, 10170)}  # of N(0, 1): mean and variance of x^k
    for power, (mean, variance) in moments.items():
        assert abs((eps**power).mean() - mean) < 4 * math.sqrt(variance / n), f"moment {power}"
    # chi-square over 50 bins of equal probability, 49 degrees of freedom: p = 1e-4
    counts = torch.histc(0.5 * torch.erfc(-eps / math.sqrt(2)), 50, 0, 1)
    assert ((counts - n / 50) ** 2 / (n / 50)).sum() < 95


def test_neighbouring_dimensions_and_positions_are_independent():
    eps_TD = noise(200, 1000).double()
    for a, b in ((eps_TD[:, 1:], eps_TD[:, :-1]), (eps_TD[1:], eps_TD[:-1])):
        for f in (lambda x: x, torch.square):
            correlation = torch.corrcoef(torch.stack([f(a).flatten(), f(b).flatten()]))[0, 1]
            assert abs(correlation) < 4 / math.sqrt(a.numel())


def test_triton_draws_the_same_noise():
    torch.testing.assert_close(noise(6, 900, "triton"), noise(6, 900), rtol=3e-6, atol=1e-6)


def test_tritons_inverse_is_good_to_both_ends():
    ends = torch.arange(2048)
    k = torch.cat([ends, 2**23 - 1 - ends, torch.arange(2**22 - 2048, 2**22 + 2048), torch.arange(8192) * 1024])
    u = (k.double() + 0.5) * 2.0**-23
    out = torch.empty(k.numel())
    inverse_kernel[(1,)](u.float(), out, k.numel())
    want = torch.special.ndtri(u)
    assert want.max() > 5.29 and torch.equal(want, -torch.special.ndtri(1 - u))
    torch.testing.assert_close(out.double(), want, rtol=3e-6, atol=0)


def test_normal_is_float32_and_broadcasts():
    eps = normal(SEED, torch.arange(3), torch.arange(2)[:, None], STREAM_LATENT, torch.tensor(1), torch.tensor(2))
    assert eps.dtype == torch.float32 and eps.shape == (2, 3)
