"""topk_mixture in Triton: the k largest without a sort, in an exact order, and the reference's own draws."""

import math

import pytest
import torch
from fastlatent_kernels import topk_gumbel, topk_mixture
from fastlatent_kernels.topk_gumbel import ClippedGumbel

pytest.importorskip("triton")
SEED = torch.tensor(2**40 + 17)


def counters(num_rows: int) -> torch.Tensor:
    rows = torch.arange(num_rows)
    return torch.stack([rows % 97, rows // 97, 65536 + rows % 5], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # in bfloat16 many logits are equal
def test_draws_the_reference_s_tokens(dtype):
    logits_BV = torch.randn(20, 700, generator=torch.Generator().manual_seed(0)).to(dtype)
    got, want = (topk_mixture(logits_BV, 1.0, 12, 0.6, SEED, counters(20), False, backend=backend)
                 for backend in ("triton", "reference"))
    assert torch.equal(got.token_B, want.token_B) and len(got.token_B.unique()) > 10
    assert torch.equal(got.ids_BK, want.ids_BK)


def test_equal_logits_come_from_the_lowest_id():
    logits_BV = torch.zeros(2, 300)
    logits_BV[0, ::2] = -0.0  # equal to 0.0
    logits_BV[1, 290:] = torch.tensor([2.0, 1.0] * 5)
    out = topk_mixture(logits_BV, 1.0, 7, 1.0, SEED, counters(2), True, backend="triton")
    assert out.ids_BK.tolist() == [[0, 1, 2, 3, 4, 5, 6], [290, 292, 294, 296, 298, 291, 293]]
    assert out.token_B.tolist() == [0, 290]
    torch.testing.assert_close(out.log_kept_B[0].item(), math.log(7 / 300))


def test_forbidden_tokens_weigh_nothing():
    logits_BV = torch.full((6, 300), -torch.inf)
    logits_BV[:, 200], logits_BV[:, 7] = 1.0, 1.0
    out = topk_mixture(logits_BV, 1.0, 20, 1.0, SEED, counters(6), False, backend="triton")
    assert set(out.token_B.tolist()) <= {7, 200}
    assert out.ids_BK[0, :4].tolist() == [7, 200, 0, 1] and (out.weights_BK[:, 2:] == 0).all()
    for got, want in ((out.weights_BK[:, :2], math.sqrt(0.5)), (out.entropy_B, math.log(2)),
                      (out.logprob_B, -math.log(2)), (out.log_kept_B, 0.0)):
        torch.testing.assert_close(got, torch.full_like(got, want), rtol=0, atol=1e-6)


def test_keys_order_values_before_ids():
    from fastlatent_kernels.topk_mixture import row_topk
    assert row_topk.padded(10) == 16 and row_topk.padded(17) == 32
    tiles = row_topk.row_tiles(torch.tensor([[-1.0] * 128 + [math.log(2.0)] * 2]), 1.0)
    assert tiles.largest_BC.tolist() == [pytest.approx([-1.0, math.log(2.0)])]
    mass = 2 + 128 * math.exp(-1) / 2
    slope = 128 * math.exp(-1) / 2 * (-1 - math.log(2.0))
    assert tiles.chunk_B3N[0, :, 0].tolist() == pytest.approx([math.log(2.0), mass, slope], rel=1e-6)


@pytest.mark.parametrize(("op", "backend", "name"), [
    (topk_mixture, "triton", "topk_mixture_triton"), (topk_mixture, "native", "topk_rows"),
    (topk_gumbel, "triton", "topk_gumbel_triton"), (topk_gumbel, "native", "topk_gumbel_rows")],
    ids=["mixture-triton", "mixture-native", "gumbel-triton", "gumbel-native"])
def test_operators_are_what_torch_expects(op, backend, name):
    head, drawn_by = (torch.randn(3, 200), 1.0, 5, 0.9), (SEED, counters(3))
    noise = ClippedGumbel()
    middle, last = ((), (False,)) if op is topk_mixture else ((noise, 1.0), ())
    assert op.why_not(backend, *head, *middle, *drawn_by, *last) is None  # loads the operator
    middle = () if op is topk_mixture else (list(noise), 1.0)
    torch.library.opcheck(getattr(torch.ops.fastlatent, name).default, (*head, *middle, *drawn_by, *last))


@pytest.mark.parametrize("backend", ["triton", "native", "reference"])
def test_compiles_whole(backend):
    torch._dynamo.reset()
    logits_BV = torch.randn(3, 200, generator=torch.Generator().manual_seed(5))
    decode = lambda logits, counter: (
        topk_mixture(logits, 1.0, 5, 0.9, SEED, counter, False, backend=backend),
        topk_gumbel(logits, 1.0, 5, 0.9, ClippedGumbel(), 1.0, SEED, counter, backend=backend))
    eager = decode(logits_BV, counters(3))
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")(logits_BV, counters(3))
    for one, other in zip(eager, compiled, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 7, 50, 64])
def test_native_finds_the_k_largest_wherever_they_lie(top_k):
    """All in one tile, one in each, with ties at the k-th across tiles, and among forbidden ids."""
    pytest.importorskip("fastlatent_kernels._C")
    g = torch.Generator().manual_seed(0)
    logits_BV = torch.randn(8, 128 * 70 + 5, generator=g)
    logits_BV[0, 128 * 69 : 128 * 70] += 20
    logits_BV[1, ::128] += 20
    logits_BV[2] = logits_BV[2].round()
    logits_BV[3] = 0
    logits_BV[4, top_k:] = -torch.inf
    logits_BV[5, -5:] += 20
    logits_BV[6] = logits_BV[6].sort().values
    logits_BV[7] = logits_BV[7].sort(descending=True).values
    for dtype in (torch.float32, torch.bfloat16):
        got, want = (topk_mixture(logits_BV.to(dtype), 0.7, top_k, 1.0, SEED, counters(8), False, backend=backend)
                     for backend in ("native", "reference"))
        assert torch.equal(got.ids_BK, want.ids_BK) and torch.equal(got.token_B, want.token_B)
        torch.testing.assert_close(got.weights_BK, want.weights_BK)


def test_native_gives_ids_of_the_vocabulary_even_of_nan():
    pytest.importorskip("fastlatent_kernels._C")
    logits_BV = torch.randn(3, 128 * 60, generator=torch.Generator().manual_seed(1))
    logits_BV[0] = torch.nan
    logits_BV[1, 5] = logits_BV[1, 128 * 30] = torch.nan
    logits_BV[2, ::2] = torch.nan
    ids_BK = topk_mixture(logits_BV, 1.0, 50, 1.0, SEED, counters(3), False, backend="native").ids_BK
    assert ids_BK.min() >= 0 and ids_BK.max() < logits_BV.shape[1]
