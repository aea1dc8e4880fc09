"""The Gaussian latent against torch.distributions and numbers by hand; what its gradients are; its limits."""

import math

import pytest
import torch
from fastlatent_kernels import gaussian_reparam
from torch.distributions import Normal, kl_divergence

BACKENDS = ["reference", "triton"]
COUNTER_23 = torch.tensor([[4, 7, 65537], [9, 3, 65536]])
SEED = torch.tensor(2**40 + 3)


def posterior(*, rows=5, width=33, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    mean_TD, logvar_TD, eps_TD = (torch.randn(rows, width, generator=g) for _ in range(3))
    return mean_TD.to(dtype).requires_grad_(), (logvar_TD - 1).to(dtype).requires_grad_(), eps_TD.to(dtype)


def gradients(scalar, *leaves):
    return torch.autograd.grad(scalar, leaves, materialize_grads=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_worked_by_hand(backend):
    mean_TD = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    logvar_TD = torch.tensor([[0.0, math.log(4)], [0.0, 0.0]])
    eps_TD = torch.tensor([[2.0, -0.5], [0.0, 0.0]])
    out = gaussian_reparam(mean_TD, logvar_TD, eps_TD=eps_TD, backend=backend)
    torch.testing.assert_close(out.z_TD, torch.tensor([[3.0, -1.0], [0.0, 0.0]]))
    # 1/2 and (4 - 1 - log 4) / 2; the prior itself costs nothing
    torch.testing.assert_close(out.kl_T, torch.tensor([0.5 + 0.8068528194, 0.0]))
    density = [-(2.0**2 + 0.5**2 + math.log(4) + 2 * math.log(2 * math.pi)) / 2, -math.log(2 * math.pi)]
    torch.testing.assert_close(out.logprob_T, torch.tensor(density))
    torch.testing.assert_close(out.variance_T, torch.tensor([2.5, 1.0]))


def test_values_equal_torch_distributions():
    mean_TD, logvar_TD, eps_TD = posterior(dtype=torch.float64)
    out = gaussian_reparam(mean_TD, logvar_TD, eps_TD=eps_TD)
    q = Normal(mean_TD, torch.exp(logvar_TD / 2))
    torch.testing.assert_close(out.kl_T, kl_divergence(q, Normal(0.0, 1.0)).sum(dim=1))
    torch.testing.assert_close(out.logprob_T, q.log_prob(out.z_TD).sum(dim=1))
    torch.testing.assert_close(out.variance_T, q.variance.mean(dim=1))


def test_reference_gradients_pass_gradcheck():
    mean_TD, logvar_TD, eps_TD = posterior(rows=3, width=4, dtype=torch.float64)

    def drawn(mean_TD, logvar_TD):
        out = gaussian_reparam(mean_TD, logvar_TD, 0.05, eps_TD=eps_TD, backend="reference")
        return out.z_TD, out.kl_T, out.variance_T

    def given(mean_TD, logvar_TD):
        return gaussian_reparam(mean_TD, logvar_TD, z_TD=2 * eps_TD, backend="reference")[1:]

    assert torch.autograd.gradcheck(drawn, (mean_TD, logvar_TD))
    assert torch.autograd.gradcheck(given, (mean_TD, logvar_TD))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replayed_z_has_the_density_and_the_score_it_was_drawn_with(dtype, backend):
    mean_TD, logvar_TD, _ = posterior(rows=2, dtype=dtype)
    drawn = gaussian_reparam(mean_TD, logvar_TD, seed=SEED, counter_T3=COUNTER_23, backend=backend)
    replayed = gaussian_reparam(mean_TD, logvar_TD, z_TD=drawn.z_TD.detach(), backend=backend)
    assert torch.equal(replayed.z_TD, drawn.z_TD) and not replayed.z_TD.requires_grad
    assert torch.equal(replayed.logprob_T, drawn.logprob_T)
    scores = [gradients(out.logprob_T.sum(), mean_TD, logvar_TD) for out in (drawn, replayed)]
    for from_draw, from_replay in zip(*scores, strict=True):
        assert torch.equal(from_draw, from_replay)
    exact = [x.detach().double().requires_grad_() for x in (mean_TD, logvar_TD)]
    logprob = Normal(exact[0], torch.exp(exact[1] / 2)).log_prob(drawn.z_TD.detach().double()).sum()
    for got, want in zip(scores[0], gradients(logprob, *exact), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_free_bits_bound_each_dimension_and_stop_its_gradient(backend):
    mean_TD = torch.tensor([[1.0, 0.1, -2.0]], requires_grad=True)  # 0.5, 0.005 and 2 nats
    logvar_TD = torch.zeros(1, 3, requires_grad=True)
    kl_T = gaussian_reparam(mean_TD, logvar_TD, 0.25, eps_TD=torch.zeros(1, 3), backend=backend).kl_T
    torch.testing.assert_close(kl_T, torch.tensor([2.75]))
    assert gradients(kl_T.sum(), mean_TD)[0].tolist() == [[1.0, 0.0, -2.0]]


@pytest.mark.parametrize("name", ["z_TD", "kl_T", "logprob_T", "variance_T"])
def test_triton_gradient_of_one_output_alone(name):
    mean_TD, logvar_TD, eps_TD = posterior()
    got, want = (gradients(getattr(gaussian_reparam(mean_TD, logvar_TD, 0.1, eps_TD=eps_TD, backend=backend), name)
                           .square().sum(), mean_TD, logvar_TD) for backend in ("triton", "reference"))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_variances_are_finite_and_take_their_limits(dtype, backend):
    mean_TD = torch.tensor([[0.5, -3.0]] * 4, dtype=dtype, requires_grad=True)
    logvar_TD = torch.tensor([[80.0], [-80.0], [1e4], [-1e4]], dtype=dtype).expand(4, 2).clone().requires_grad_()
    out = gaussian_reparam(mean_TD, logvar_TD, eps_TD=torch.tensor([[1.0, -2.0]] * 4), backend=backend)
    d_mean_TD, d_logvar_TD = gradients(sum(x.float().sum() for x in out), mean_TD, logvar_TD)
    for tensor in (*out, d_mean_TD, d_logvar_TD):
        assert tensor.isfinite().all()
    assert torch.equal(out.z_TD[1], mean_TD[1])  # the deviation is below the rounding of the mean
    torch.testing.assert_close(out.kl_T[1].item(), (0.5**2 + 3.0**2) / 2 + 79, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.kl_T[0].item(), math.exp(80), rtol=1e-5, atol=0)
    for a, b in ((0, 2), (1, 3)):  # beyond 80 the variance stays, and its gradient ends
        assert all(torch.equal(x[a], x[b]) for x in out)
    assert torch.equal(d_logvar_TD[2:], torch.zeros_like(d_logvar_TD[2:])) and (d_logvar_TD[:2] != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_not_clamped_away(backend):
    good, bad = torch.zeros(1, 3), torch.tensor([[0.0, torch.nan, 0.0]])
    for mean_TD, logvar_TD in ((good, bad), (bad, good)):
        out = gaussian_reparam(mean_TD, logvar_TD, 0.5, eps_TD=good, backend=backend)
        assert all(x.isnan().any() for x in out[:3])
    assert gaussian_reparam(good, bad, eps_TD=good, backend=backend).variance_T.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_draw_depends_on_its_address_alone(backend):
    mean_TD, logvar_TD, _ = posterior(rows=6, width=40)
    counter_T3 = torch.randint(2**16, (6, 3), generator=torch.Generator().manual_seed(1))
    draw = lambda mean, logvar, counter: gaussian_reparam(
        mean, logvar, seed=SEED, counter_T3=counter, backend=backend)
    whole = draw(mean_TD, logvar_TD, counter_T3)
    order = torch.tensor([4, 0, 5])
    for some, all_of_it in zip(draw(mean_TD[order], logvar_TD[order], counter_T3[order]), whole, strict=True):
        assert torch.equal(some, all_of_it[order])
    assert torch.equal(draw(mean_TD[:, :7], logvar_TD[:, :7], counter_T3).z_TD, whole.z_TD[:, :7])
    assert not torch.equal(draw(mean_TD, logvar_TD, counter_T3 + torch.tensor([1, 0, 0])).z_TD, whole.z_TD)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layout_and_emptiness_do_not_matter(backend):
    mean_TD, logvar_TD, eps_TD = (x.detach() for x in posterior(rows=4, width=6))
    tall = lambda x: x.t().contiguous().t()
    want = gaussian_reparam(mean_TD, logvar_TD, eps_TD=eps_TD, backend=backend)
    got = gaussian_reparam(tall(mean_TD), tall(logvar_TD), eps_TD=tall(eps_TD), backend=backend)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # torch sums in the order of the layout
    nothing = gaussian_reparam(mean_TD[:0], logvar_TD[:0], seed=SEED, counter_T3=COUNTER_23[:0], backend=backend)
    assert [tuple(x.shape) for x in nothing] == [(0, 6), (0,), (0,), (0,)]


def test_log_density_ratio_averages_to_the_kl():
    mean_D, logvar_D = torch.tensor([0.8, -0.3, 0.0]), torch.tensor([-1.0, 0.5, -3.0])
    num_draws = 100_000
    counter_T3 = torch.stack([torch.arange(num_draws), torch.full([num_draws], 3), torch.full([num_draws], 65536)], 1)
    out = gaussian_reparam(mean_D.expand(num_draws, 3), logvar_D.expand(num_draws, 3), seed=SEED,
                           counter_T3=counter_T3, backend="reference")
    log_ratio_T = out.logprob_T - Normal(0.0, 1.0).log_prob(out.z_TD).sum(dim=1)
    standard_error = log_ratio_T.std() / num_draws**0.5
    assert abs(log_ratio_T.mean() - out.kl_T[0]) < 4 * standard_error < 0.03


@pytest.mark.parametrize(("change", "message"), [
    ({"logvar_TD": torch.zeros(2, 4)}, r"logvar_TD: expected .* tensor of shape \[2, 3\]"),
    ({"free_bits": -0.1}, r"free_bits: expected a finite number >= 0, got -0\.1"),
    ({"eps_TD": None}, "noise: expected seed and counter_T3, or eps_TD, or z_TD, got none"),
    ({"seed": SEED}, "noise: .* got seed and eps_TD"),
    ({"z_TD": torch.zeros(2, 3)}, "noise: .* got eps_TD and z_TD"),
    ({"eps_TD": torch.zeros(3)}, r"eps_TD: expected .* tensor of shape \[2, 3\]"),
    ({"eps_TD": None, "z_TD": torch.zeros(2, 3).double()}, "z_TD: expected a float32 tensor"),
    ({"eps_TD": None, "seed": SEED, "counter_T3": COUNTER_23.int()}, "counter_T3: expected a int64 tensor"),
])
def test_wrong_arguments_are_named(change, message):
    arguments = {"mean_TD": torch.zeros(2, 3), "logvar_TD": torch.zeros(2, 3), "eps_TD": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=f"^{message}"):
        gaussian_reparam(**(arguments | change))
