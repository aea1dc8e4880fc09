"""vocab_head in Triton: the reference's tokens whatever the batch, ties, saturated logits, the mixture by hand."""

import math

import pytest
import torch
from fastlatent_kernels import vocab_head

SEED = torch.tensor(2**40 + 17)


def counters(num_rows: int) -> torch.Tensor:
    rows = torch.arange(num_rows)
    return torch.stack([rows % 7, rows // 7 + 2**31, 65536 + rows % 5], dim=1)


def head(hidden_BD, weight_VD, *, temperature=1.0, counter_B3=None, greedy=False, embed_VD=None, backend="triton"):
    counter_B3 = counters(len(hidden_BD)) if counter_B3 is None else counter_B3
    return vocab_head(hidden_BD, weight_VD, temperature, SEED, counter_B3, greedy, embed_VD, backend=backend)


def logits_head(logits_BV, **options):
    """These very logits: the hidden states pick columns of an identity."""
    return head(logits_BV, torch.eye(logits_BV.shape[1]), **options)


@pytest.mark.parametrize(("V", "temperature"), [(300, 1.0), (129, 0.3)])
def test_tokens_are_the_reference_s(V, temperature):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 24, generator=generator), torch.randn(V, 24, generator=generator) / 3
    got, want = (head(hidden, weight, temperature=temperature, backend=b) for b in ("triton", "reference"))
    assert torch.equal(got.token_B, want.token_B)
    assert len(got.token_B.unique()) > 10
    torch.testing.assert_close(got.logprob_B, want.logprob_B, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.entropy_B, want.entropy_B, rtol=0, atol=1e-5)


def test_a_row_does_not_depend_on_what_it_is_batched_with():
    generator = torch.Generator().manual_seed(1)
    hidden, counter = torch.randn(35, 16, generator=generator), counters(35)  # more than one block of rows
    weight, embed = (torch.randn(700, 16, generator=generator) for _ in range(2))
    whole = head(hidden, weight, counter_B3=counter, embed_VD=embed)
    rows = torch.tensor([34, 3, 17])
    some = head(hidden[rows], weight, counter_B3=counter[rows], embed_VD=embed)
    assert all(torch.equal(a, b[rows]) for a, b in zip(some, whole, strict=True))
    assert not torch.equal(head(hidden[rows], weight, counter_B3=counter[rows] + 1).token_B, some.token_B)


def test_greedy_takes_the_lowest_of_equal_ids():
    logits = torch.zeros(4, 300)
    logits[0, [299, 140, 150]] = logits[1, [127, 128]] = logits[2, [5, 256]] = 2.5
    assert logits_head(logits, greedy=True).token_B.tolist() == [140, 127, 5, 0]


@pytest.mark.parametrize("greedy", [True, False])
def test_mixture_is_p_over_its_norm_worked_by_hand(greedy):
    # softmax(ln 1, ln 2, ln 1) = (1, 2, 1) / 4, norm sqrt(6) / 4; at T = 1/2: (1, 4, 1) / 6, norm sqrt(18) / 6
    logits, embed = torch.full((1, 300), -100.0), torch.zeros(300, 5)
    ids = [3, 140, 299]  # one in each tile
    logits[0, ids] = torch.tensor([0.0, math.log(2), 0.0])
    embed[ids] = torch.eye(3, 5)
    for temperature, weights in ((1.0, (1.0, 2.0, 1.0)), (0.5, (1.0, 4.0, 1.0))):
        out = logits_head(logits, temperature=temperature, greedy=greedy, embed_VD=embed)
        want = torch.tensor([[w / math.hypot(*weights) for w in weights] + [0.0, 0.0]])
        torch.testing.assert_close(out.mixture_BD, want)
        p = torch.tensor(weights) / sum(weights)
        assert out.entropy_B.item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-6)
        assert out.token_B.item() in ids and (not greedy or out.token_B.item() == 140)
        assert out.logprob_B.item() == pytest.approx(p[ids.index(out.token_B.item())].log().item(), abs=1e-6)


def test_saturated_logits_are_one_token():
    logits, embed = torch.full((3, 200), -80.0), torch.randn(200, 8, generator=torch.Generator().manual_seed(2))
    logits[torch.arange(3), torch.tensor([0, 130, 199])] = 80.0
    out = logits_head(logits, temperature=0.5, embed_VD=embed)
    assert out.token_B.tolist() == [0, 130, 199]
    assert (out.logprob_B == 0).all() and (out.entropy_B == 0).all()
    torch.testing.assert_close(out.mixture_BD, embed[out.token_B], rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_diverged_model_is_seen_and_reads_no_foreign_memory():
    out = head(torch.full((2, 16), math.nan), torch.ones(130, 16))
    assert ((out.token_B >= 0) & (out.token_B < 130)).all() and out.logprob_B.isnan().all()


def test_untied_embedding_may_have_its_own_width_and_dtype_and_any_stride():
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(16, 4, generator=generator).bfloat16().t()
    weight, embed = torch.randn(300, 16, generator=generator), torch.randn(24, 300, generator=generator).t()
    counter = counters(4).t().contiguous().t()
    got = head(hidden, weight, counter_B3=counter, embed_VD=embed)
    exact = (hidden.double() @ weight.bfloat16().double().t()).softmax(1)
    want = exact / exact.norm(dim=1, keepdim=True) @ embed.double()
    assert got.mixture_BD.dtype == torch.float32
    torch.testing.assert_close(got.mixture_BD.double(), want, rtol=0, atol=3e-6)
    torch.testing.assert_close(got.entropy_B.double(), torch.special.entr(exact).sum(1), rtol=0, atol=3e-6)


@pytest.mark.parametrize("width", [None, 24])
def test_operator_is_well_registered(width):
    generator = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(3, 16, generator=generator), torch.randn(140, 16, generator=generator)
    embed = None if width is None else torch.randn(140, width, generator=generator)
    eager = head(hidden, weight, embed_VD=embed)
    torch.library.opcheck(
        torch.ops.fastlatent.vocab_head_triton.default, (hidden, weight, 1.0, SEED, counters(3), False, embed))
    torch._dynamo.reset()
    compiled = torch.compile(vocab_head, fullgraph=True, backend="aot_eager")(
        hidden, weight, 1.0, SEED, counters(3), False, embed, backend="triton")
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
