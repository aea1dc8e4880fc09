"""The two sampling heads: the law of what they draw, its independence of the batch, the mixture, native twins."""

import math

import pytest
import torch
from fastlatent_kernels import topk_mixture, use_backend, vocab_head

BACKENDS = ["reference", "native"]
SEED = torch.tensor(2**40 + 17)


def counters(num_rows: int, first: int = 0) -> torch.Tensor:
    rows = torch.arange(first, first + num_rows)
    return torch.stack([rows % 97, rows // 97, 65536 + rows % 5], dim=1)


def head_of(logits_BV: torch.Tensor, *args, backend: str, embed_VD=None, greedy=False):
    """vocab_head with these very logits: the hidden states pick columns of an identity."""
    return vocab_head(logits_BV, torch.eye(logits_BV.shape[1]), *args, greedy, embed_VD, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_vocab_head_draws_from_the_softmax(backend, temperature):
    num_draws, V = 20_000, 300  # three tiles, the last one short
    logits = torch.randn(V, generator=torch.Generator().manual_seed(0))
    p = (logits.double() / temperature).softmax(0)
    token = head_of(logits.expand(num_draws, V), temperature, SEED, counters(num_draws), backend=backend).token_B
    assert_law(token, p)


@pytest.mark.parametrize("backend", BACKENDS)
def test_topk_mixture_draws_from_the_truncated_softmax(backend):
    num_draws, V, K = 20_000, 300, 40
    logits = torch.randn(V, generator=torch.Generator().manual_seed(0))
    p = logits.double().softmax(0)
    order = p.sort(descending=True)
    is_kept = (order.values.cumsum(0) - order.values < 0.35) & (torch.arange(V) < K)
    assert 5 < is_kept.sum() < K  # both truncations bite somewhere
    kept = torch.zeros_like(p).index_put((order.indices[is_kept],), order.values[is_kept])
    out = topk_mixture(logits.expand(num_draws, V), 1.0, K, 0.35, SEED, counters(num_draws), False, backend=backend)
    assert_law(out.token_B, kept / kept.sum())
    torch.testing.assert_close(out.log_kept_B, kept.sum().log().float().expand(num_draws), rtol=0, atol=1e-6)
    torch.testing.assert_close(out.logprob_B, p.log().float()[out.token_B], rtol=0, atol=2e-6)
    dense = torch.zeros(V).index_put((out.ids_BK[0],), out.weights_BK[0])
    torch.testing.assert_close(dense, (kept / kept.norm()).float(), rtol=0, atol=1e-6)


def assert_law(token_B: torch.Tensor, p_V: torch.Tensor) -> None:
    """Chi-square at p = 1e-4 over the ids expected at least five times, with the rest as one bin."""
    counts, expected = torch.bincount(token_B, minlength=len(p_V)).double(), p_V * len(token_B)
    assert (counts[p_V == 0] == 0).all()
    big = expected >= 5
    observed = torch.cat([counts[big], counts[~big].sum()[None]])
    wanted = torch.cat([expected[big], expected[~big].sum()[None]])
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    dof = len(wanted) - 1
    assert dof > 5
    limit = dof * (1 - 2 / (9 * dof) + 3.72 * math.sqrt(2 / (9 * dof))) ** 3  # Wilson-Hilferty
    assert ((observed - wanted) ** 2 / wanted).sum() < limit


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_does_not_depend_on_what_it_is_batched_with(backend):
    generator = torch.Generator().manual_seed(1)
    logits, counter = torch.randn(24, 1000, generator=generator), counters(24)
    order = torch.randperm(24, generator=generator)
    for draw in (lambda l, c: head_of(l, 1.0, SEED, c, backend=backend).token_B,
                 lambda l, c: topk_mixture(l, 1.0, 50, 0.9, SEED, c, False, backend=backend).token_B):
        whole = draw(logits, counter)
        assert torch.equal(draw(logits[order], counter[order]), whole[order])
        assert torch.equal(torch.cat([draw(logits[i:i + 1], counter[i:i + 1]) for i in range(24)]), whole)
        assert not torch.equal(draw(logits, counter + 1), whole)
        assert len(whole.unique()) > 12


def test_native_tokens_are_the_reference_s_on_every_instruction_set():
    import fastlatent_kernels._C as _C
    from fastlatent_kernels.topk_mixture import TopkMixture
    generator = torch.Generator().manual_seed(2)
    for V, dtype in ((1, torch.float32), (127, torch.float32), (1000, torch.bfloat16), (4096, torch.float32)):
        logits, counter = (4 * torch.randn(200, V, generator=generator)).to(dtype), counters(200)
        head = head_of(logits.float(), 0.7, SEED, counter, backend="reference", embed_VD=torch.eye(V))
        top = topk_mixture(logits, 0.7, min(V, 50), 0.95, SEED, counter, False, backend="reference")
        assert topk_mixture.chosen(logits, 0.7, 1, 1.0, SEED, counter, False) == "native"  # loads the operators
        assert vocab_head.why_not("native", logits, logits.t(), 1.0, SEED, counter, False, None) is None
        for isa in _C.isas():
            token, logprob, entropy, unit_p = torch.ops.fastlatent.vocab_rows(
                logits, 0.7, SEED, counter, False, torch.float32, isa)
            assert torch.equal(token, head.token_B)
            torch.testing.assert_close(logprob, head.logprob_B, rtol=0, atol=1e-5)
            torch.testing.assert_close(entropy, head.entropy_B, rtol=0, atol=1e-5)
            torch.testing.assert_close(unit_p, head.mixture_BD, rtol=0, atol=2e-6)
            out = TopkMixture(*torch.ops.fastlatent.topk_rows(
                logits, 0.7, min(V, 50), 0.95, SEED, counter, False, isa))
            assert torch.equal(out.token_B, top.token_B) and torch.equal(out.ids_BK, top.ids_BK)
            for name in ("logprob_B", "log_kept_B", "entropy_B", "weights_BK"):
                torch.testing.assert_close(getattr(out, name), getattr(top, name), rtol=0, atol=1e-5)


def test_native_results_do_not_depend_on_the_number_of_threads():
    logits = torch.randn(37, 1000, generator=torch.Generator().manual_seed(3))
    draw = lambda: head_of(logits, 1.0, SEED, counters(37), backend="native", embed_VD=torch.eye(1000))
    one = draw()
    torch.set_num_threads(3)
    try:
        assert all(torch.equal(a, b) for a, b in zip(draw(), one, strict=True))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixture_is_p_over_its_norm_worked_by_hand(backend):
    # softmax((ln 1, ln 2, ln 1) / 1) = (1, 2, 1) / 4; norm sqrt(6) / 4; at T = 1/2: (1, 4, 1) / 6, norm sqrt(18) / 6
    logits, embed = torch.tensor([[0.0, math.log(2), 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [10.0, 0.0]])
    for temperature, unit_p in ((1.0, (1, 2, 1)), (0.5, (1, 4, 1))):
        norm = math.sqrt(sum(x * x for x in unit_p))
        want = torch.tensor([[11 * unit_p[0] / norm, unit_p[1] / norm]])
        for greedy in (True, False):
            out = head_of(logits, temperature, SEED, counters(1), backend=backend, embed_VD=embed, greedy=greedy)
            torch.testing.assert_close(out.mixture_BD, want)
        assert head_of(logits, temperature, SEED, counters(1), backend=backend, greedy=True).token_B.item() == 1
        p = torch.tensor(unit_p) / sum(unit_p)
        assert out.entropy_B.item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-6)
        top = topk_mixture(logits, temperature, 2, 1.0, SEED, counters(1), True, backend=backend)
        assert top.ids_BK.tolist() == [[1, 0]]  # 0 and 2 are equally likely: the lower id
        torch.testing.assert_close(top.weights_BK, torch.tensor([[unit_p[1], unit_p[0]]]) / math.hypot(*unit_p[:2]))
        assert top.log_kept_B.item() == pytest.approx(math.log((unit_p[0] + unit_p[1]) / sum(unit_p)), abs=1e-6)
        assert top.logprob_B.item() == pytest.approx(math.log(unit_p[1] / sum(unit_p)), abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_forbidden_tokens_weigh_nothing(backend):
    logits = torch.full((40, 300), -torch.inf)
    logits[:, 200], logits[:, 7] = 1.0, 1.0
    out = topk_mixture(logits, 1.0, 50, 1.0, SEED, counters(40), False, backend=backend)
    assert set(out.token_B.tolist()) == {7, 200}
    assert out.ids_BK[0, :4].tolist() == [7, 200, 0, 1] and (out.weights_BK[:, 2:] == 0).all()
    for got, want in ((out.weights_BK[:, :2], math.sqrt(0.5)), (out.entropy_B, math.log(2)),
                      (out.logprob_B, -math.log(2)), (out.log_kept_B, 0.0)):
        torch.testing.assert_close(got, torch.full_like(got, want), rtol=0, atol=1e-6)


@pytest.mark.parametrize("at", [0, 5, 299])
def test_a_nan_among_the_logits_shows_in_its_row_and_in_no_other(at):
    from fastlatent_kernels.topk_mixture.native_impl import _C
    from fastlatent_kernels.vocab_head import native_impl as _  # loads the other operator
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(5))
    broken = logits.clone()
    broken[1, at] = torch.nan
    for dtype in (torch.float32, torch.bfloat16):
        for isa in _C.isas():
            for operator, options in ((torch.ops.fastlatent.vocab_rows, (False, torch.float32)),
                                      (torch.ops.fastlatent.topk_rows, (False,))):
                truncation = (40, 0.9) if operator is torch.ops.fastlatent.topk_rows else ()
                got, want = (operator(x.to(dtype), 0.7, *truncation, SEED, counters(3), *options, isa)
                             for x in (broken, logits))
                assert 0 <= got[0][1] < 300 and got[1].isnan().tolist() == [False, True, False]
                assert all(torch.equal(a[[0, 2]], b[[0, 2]]) for a, b in zip(got, want, strict=True))


def test_arguments_that_do_not_fit_are_named():
    hidden, weight, counter = torch.zeros(2, 3), torch.zeros(9, 3), counters(2)
    for name, args in {"temperature": (hidden, weight, 0.0, SEED, counter),
                       "seed": (hidden, weight, 1.0, SEED.float(), counter),
                       "counter_B3": (hidden, weight, 1.0, SEED, counter[:1]),
                       "weight_VD": (hidden, weight.t(), 1.0, SEED, counter)}.items():
        with pytest.raises(ValueError, match=f"^{name}: expected "):
            vocab_head(*args, False, None)
    for top_k, top_p, message in ((0, 1.0, "top_k: expected a whole number from 1 to 9, got 0"),
                                  (10, 1.0, "top_k: .* got 10"),
                                  (5, 0.0, "top_p: expected a number above 0, at most 1, got 0.0")):
        with use_backend("native"), pytest.raises(ValueError, match=message):
            topk_mixture(torch.zeros(2, 9), 1.0, top_k, top_p, SEED, counter, False)
