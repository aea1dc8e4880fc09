"""Latent-GRPO's sampler: pruning is exact, noise is clipped and addressed by id, ties and forbidden ids are ordered."""

import math

import pytest
import torch
from fastlatent_kernels import ClippedGumbel, topk_gumbel
from fastlatent_kernels.noise import STREAM_LATENT, row_gumbel

BACKENDS = ["reference", "native", "triton"]
FAST = ["reference", "native"]  # Triton's interpreter takes a tenth of a second a row
SEED = torch.tensor(2**41 + 9)


def counters(num_rows: int) -> torch.Tensor:
    rows = torch.arange(num_rows)
    return torch.stack([rows % 89, rows // 89, 65536 + rows % 7], dim=1)


def sample(logits_BV, *, temperature=1.0, top_k=10, top_p=0.95, noise=None, tau=1.0, backend):
    return topk_gumbel(logits_BV, temperature, top_k, top_p, noise or ClippedGumbel(), tau, SEED,
                       counters(len(logits_BV)), backend=backend)


def full_sort_sampler(logits_BV, temperature, top_k, top_p, noise):
    """ids, scores and number of candidates in float64: sort the row, cut it, add noise to all of it, sort again."""
    logprob_BV = (logits_BV.double() / temperature).log_softmax(1)
    order_BV = logits_BV.double().sort(dim=1, descending=True, stable=True).indices
    p_BV = logprob_BV.gather(1, order_BV).exp()
    place_BV = torch.empty_like(order_BV).scatter_(1, order_BV, torch.arange(logits_BV.shape[1]).expand_as(order_BV))
    before_BV = (p_BV.cumsum(1) - p_BV).gather(1, place_BV)
    is_candidate_BV = (before_BV < top_p) | (place_BV < top_k)
    g_BV = row_gumbel(SEED, torch.arange(logits_BV.shape[1]), STREAM_LATENT, counters(len(logits_BV))).double()
    score_BV = logprob_BV + noise.scale * (g_BV.clamp(noise.low, noise.high) + noise.shift)
    score_BV[~is_candidate_BV] = -torch.inf
    ranked = score_BV.sort(dim=1, descending=True, stable=True)
    return ranked.indices[:, :top_k], ranked.values[:, :top_k], is_candidate_BV.sum(1)


SETTINGS = [  # V, spread of the logits, temperature, top_k, top_p, noise
    (70, 0.3, 1.0, 10, 0.95, ClippedGumbel()), (300, 3.0, 1.0, 10, 0.95, ClippedGumbel()),
    (131, 6.0, 0.6, 5, 0.95, ClippedGumbel(shift=0.0)), (129, 2.0, 1.3, 1, 0.5, ClippedGumbel(scale=0.3)),
    (128, 1.0, 1.0, 64, 0.3, ClippedGumbel()), (100, 4.0, 1.0, 3, 0.99, ClippedGumbel(-0.2, 0.4, 0.0, 2.0)),
    (90, 2.0, 1.0, 10, 1.0, ClippedGumbel(-30.0, 30.0, 0.0)), (64, 8.0, 2.0, 20, 0.05, ClippedGumbel()),
    (257, 0.0, 1.0, 10, 0.2, ClippedGumbel()), (40, 3.0, 1.0, 40, 0.9, ClippedGumbel(scale=0.0)),
    (90, 3.0, 1.0, 10, 0.9, ClippedGumbel(-float("inf"), float("inf"), 0.0, 0.0))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # in bfloat16 many logits are equal
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"V{s[0]}-K{s[3]}-p{s[4]}")
@pytest.mark.parametrize("backend", FAST)
def test_pruning_changes_nothing(backend, setting, dtype):
    """10^5 rows a backend; where two scores or masses nearly tie, rounding may decide: in one row of 2000."""
    V, spread, temperature, top_k, top_p, noise = setting
    num_rows = 5_000
    logits_BV = (spread * torch.randn(num_rows, V, generator=torch.Generator().manual_seed(V))).to(dtype)
    ids_BK, score_BK, num_candidates_B = full_sort_sampler(logits_BV, temperature, top_k, top_p, noise)
    out = sample(logits_BV, temperature=temperature, top_k=top_k, top_p=top_p, noise=noise, backend=backend)
    torch.testing.assert_close(out.score_BK.double(), score_BK, rtol=0, atol=2e-5)
    is_same_B = (out.ids_BK == ids_BK).all(1) & (out.num_candidates_B == num_candidates_B)
    assert is_same_B.double().mean() >= 1 - 1 / 2000


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token_without_noise_is_the_greedy_one(backend):
    logits_BV = 3 * torch.randn(8, 300, generator=torch.Generator().manual_seed(0))
    out = sample(logits_BV, top_k=1, noise=ClippedGumbel(scale=0.0), backend=backend)
    assert torch.equal(out.ids_BK[:, 0], logits_BV.argmax(1)) and torch.equal(out.likeliest_B, logits_BV.argmax(1))
    torch.testing.assert_close(out.score_BK, out.logprob_BK)
    assert (out.weights_BK == 1).all()


@pytest.mark.parametrize("backend", FAST)
def test_unclipped_noise_draws_from_the_softmax(backend):
    num_draws, p_V = 20_000, torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    noise = ClippedGumbel(-50.0, 50.0, 0.0)
    ids = sample(p_V.log().expand(num_draws, 5), top_k=2, top_p=1.0, noise=noise, backend=backend).ids_BK
    expected = num_draws * p_V
    assert ((torch.bincount(ids[:, 0]) - expected) ** 2 / expected).sum() < 23.5  # chi-square, 4 dof, p = 1e-4
    # the second is drawn from the rest (Plackett-Luce): P(0 second) = sum over i > 0 of p_i * 0.4 / (1 - p_i)
    want = (p_V[1:] * 0.4 / (1 - p_V[1:])).sum().item()
    assert (ids[:, 1] == 0).double().mean().item() == pytest.approx(want, abs=4 * math.sqrt(want / num_draws))


@pytest.mark.parametrize("backend", FAST)
def test_noise_is_clipped_at_both_ends_as_often_as_gumbel_exceeds_them(backend):
    logits_BV, num_rows = torch.zeros(4_000, 8), 4_000
    out = sample(logits_BV, top_k=8, backend=backend)
    noise_BK = out.score_BK - out.logprob_BK
    assert noise_BK.min() >= -1e-5 and noise_BK.max() <= 4.5 + 1e-5
    for end, p in ((0.0, math.exp(-math.exp(1.5))), (4.5, 1 - math.exp(-math.exp(-3.0)))):
        share = ((noise_BK - end).abs() < 1e-5).double().mean().item()
        assert share == pytest.approx(p, abs=4 * math.sqrt(p / (8 * num_rows)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sidedness_moves_the_scores_and_nothing_else(backend):
    logits_BV = 2 * torch.randn(5, 200, generator=torch.Generator().manual_seed(1))
    one, two = (sample(logits_BV, noise=ClippedGumbel(shift=shift), tau=0.5, backend=backend) for shift in (1.7, 0.0))
    torch.testing.assert_close(one.score_BK, two.score_BK + 1.7)
    torch.testing.assert_close(one.weights_BK, two.weights_BK)
    torch.testing.assert_close(one.weights_BK, (2 * one.score_BK).softmax(1))
    assert torch.equal(one.ids_BK, two.ids_BK)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_logits_are_kept_from_the_lowest_id(backend):
    logits_BV = torch.zeros(3, 300)
    logits_BV[:, 1::2] = -0.0
    out = sample(logits_BV, top_k=4, top_p=0.499, noise=ClippedGumbel(scale=0.0), backend=backend)
    assert out.ids_BK.tolist() == [[0, 1, 2, 3]] * 3
    assert out.num_candidates_B.tolist() == [150] * 3
    torch.testing.assert_close(out.log_kept_B, torch.full((3,), math.log(0.5)))
    assert sample(logits_BV, top_k=4, top_p=0.499, backend=backend).ids_BK.max() < 150
    # 7 ties at 1 hold the nucleus' end: 0.5 of the mass is the token at 3 and some of them
    logits_BV = torch.full((1, 300), -20.0)
    logits_BV[0, 250], logits_BV[0, 100:240:20] = 3.0, 1.5
    mass = math.exp(3.0) + 7 * math.exp(1.5) + 292 * math.exp(-20.0)
    num_ties = math.ceil((0.75 * mass - math.exp(3.0)) / math.exp(1.5))
    out = sample(logits_BV, top_k=2, top_p=0.75, noise=ClippedGumbel(scale=0.0), backend=backend)
    assert 1 < num_ties < 7 and out.num_candidates_B.item() == 1 + num_ties
    torch.testing.assert_close(out.log_kept_B.exp().item(), (math.exp(3.0) + num_ties * math.exp(1.5)) / mass)


@pytest.mark.parametrize("backend", BACKENDS)
def test_forbidden_tokens_never_win(backend):
    logits_BV = torch.full((4, 300), -torch.inf)
    logits_BV[:, 200], logits_BV[:, 7] = 1.0, 1.0
    for top_p in (1.0, 0.95):
        out = sample(logits_BV, top_k=4, top_p=top_p, backend=backend)
        assert out.num_candidates_B.tolist() == [2] * 4
        assert all(set(ids[:2]) == {7, 200} and ids[2:] == [0, 1] for ids in out.ids_BK.tolist())
        assert (out.score_BK[:, 2:] == -torch.inf).all() and (out.weights_BK[:, 2:] == 0).all()
        torch.testing.assert_close(out.entropy_B, torch.full((4,), math.log(2)))
        torch.testing.assert_close(out.log_kept_B, torch.zeros(4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top_p", [0.95, 1.0])
def test_saturated_rows(backend, top_p):
    logits_BV = torch.full((2, 200), -80.0)
    logits_BV[0, 150] = 80.0
    logits_BV[1, ::2] = 80.0
    out = sample(logits_BV, top_k=3, top_p=top_p, backend=backend)
    assert out.ids_BK[0, 0] == 150 and (out.ids_BK[1] % 2 == 0).all()
    assert all(tensor.isfinite().all() for tensor in out)
    torch.testing.assert_close(out.entropy_B, torch.tensor([0.0, math.log(100)]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_what_it_is_batched_with(backend):
    generator = torch.Generator().manual_seed(1)
    logits_BV, counter_B3 = torch.randn(5, 260, generator=generator), counters(5)
    draw = lambda rows: topk_gumbel(logits_BV[rows], 1.0, 6, 0.9, ClippedGumbel(), 1.0, SEED, counter_B3[rows],
                                    backend=backend)
    whole, order = draw(torch.arange(5)), torch.tensor([3, 0, 4])
    for all_rows, some in zip(whole, draw(order), strict=True):
        assert torch.equal(all_rows[order], some)
    moved = topk_gumbel(logits_BV, 1.0, 6, 0.9, ClippedGumbel(), 1.0, SEED, counter_B3 + 1, backend=backend)
    assert not torch.equal(moved.ids_BK, whole.ids_BK)


def test_native_instruction_sets_agree_with_the_reference():
    import fastlatent_kernels._C as _C
    generator = torch.Generator().manual_seed(2)
    noise = ClippedGumbel()
    for V, dtype in ((1, torch.float32), (127, torch.float32), (1000, torch.bfloat16), (4096, torch.float32)):
        logits_BV = (4 * torch.randn(50, V, generator=generator)).to(dtype)
        want = sample(logits_BV, temperature=0.7, top_k=min(V, 10), tau=0.5, backend="reference")
        assert topk_gumbel.why_not("native", logits_BV, 0.7, 1, 1.0, noise, 1.0, SEED, counters(50)) is None  # loads it
        for isa in _C.isas():
            got = torch.ops.fastlatent.topk_gumbel_rows(logits_BV, 0.7, min(V, 10), 0.95, list(noise), 0.5, SEED,
                                                        counters(50), isa)
            for name, a, b in zip(want._fields, got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_nan_among_the_logits_shows_and_every_id_is_one(top_p):
    """The NaN keeps the likeliest from being sorted: pruning by them would leave fewer than k."""
    from fastlatent_kernels.topk_gumbel.native_impl import _C
    logits_BV = torch.full((2, 512), -1000.0)
    logits_BV[:, 300], logits_BV[0, 62] = 10.0, torch.nan
    for dtype in (torch.float32, torch.bfloat16):
        for isa in _C.isas():
            ids_BK, score_BK, logprob_BK, *_ = torch.ops.fastlatent.topk_gumbel_rows(
                logits_BV.to(dtype), 1.0, 64, top_p, list(ClippedGumbel()), 1.0, SEED, counters(2), isa)
            assert ids_BK[0].unique().numel() == 64 and 0 <= ids_BK.min() and ids_BK.max() < 512
            assert logprob_BK[0].isnan().all() and not logprob_BK[1].isnan().any() and ids_BK[1, 0] == 300


@pytest.mark.parametrize(("change", "message"), [
    ({"logits_BV": torch.zeros(9)}, "logits_BV: expected "), ({"temperature": 0.0}, "temperature: expected "),
    ({"top_k": 10}, "top_k: expected a whole number from 1 to 9, got 10"), ({"top_p": 0.0}, "top_p: expected "),
    ({"noise": ClippedGumbel(low=4.0)}, "noise: expected low <= high and scale >= 0, got ClippedGumbel"),
    ({"mixture_temperature": -1.0}, "mixture_temperature: expected a number above 0, got -1.0"),
    ({"seed": SEED.float()}, "seed: expected "), ({"counter_B3": counters(3)}, "counter_B3: expected ")])
def test_arguments_that_do_not_fit_are_named(change, message):
    fitting = {"logits_BV": torch.zeros(2, 9), "temperature": 1.0, "top_k": 2, "top_p": 0.9, "noise": ClippedGumbel(),
               "mixture_temperature": 1.0, "seed": SEED, "counter_B3": counters(2)}
    with pytest.raises(ValueError, match=f"^{message}"):
        topk_gumbel(**fitting | change)
