"""What is not known is not hidden: a NaN among the logits shows in every number of its row and in no other row, whatever the
backend."""

import pytest
import torch
from fastlatent_kernels import ClippedGumbel, topk_gumbel, topk_mixture, vocab_head

BACKENDS = ["reference", "native", "triton"]
SEED = torch.tensor(2**40 + 17)
V, K = 300, 20
NEGATIVE_NAN = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # as inf - inf is on x86; below -inf as an integer

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def counters(num_rows: int) -> torch.Tensor:
    rows = torch.arange(num_rows)
    return torch.stack([rows, rows + 3, 65536 + rows], dim=1)


def rows_of_logits() -> tuple[torch.Tensor, list[bool]]:
    """Rows of which nothing can be known, each between two of which all can."""
    logits_BV = torch.randn(15, V, generator=torch.Generator().manual_seed(1))
    logits_BV[1], logits_BV[3, 5], logits_BV[5, ::2] = torch.nan, torch.nan, torch.nan
    logits_BV[7], logits_BV[9, 299] = NEGATIVE_NAN, NEGATIVE_NAN
    logits_BV[11] = -torch.inf  # all forbidden
    logits_BV[13, 5] = torch.inf
    logits_BV[14, ::3] = -torch.inf
    return logits_BV, [row % 2 == 1 for row in range(15)]


def assert_shown(out, is_lost: list[bool], num_ids: int) -> None:
    for name, tensor in zip(out._fields, out, strict=True):
        if tensor.is_floating_point():
            is_nan_BN = tensor.reshape(len(is_lost), -1).isnan()
            assert is_nan_BN.all(dim=1).tolist() == is_nan_BN.any(dim=1).tolist() == is_lost, name
        else:
            assert 0 <= tensor.min() and tensor.max() < num_ids + (name == "num_candidates_B"), name


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_a_mixture(backend, greedy, top_p):
    logits_BV, is_lost = rows_of_logits()
    out = topk_mixture(logits_BV, 0.7, K, top_p, SEED, counters(15), greedy, backend=backend)
    assert_shown(out, is_lost, V)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_noisy_scores(backend, top_p):
    logits_BV, is_lost = rows_of_logits()
    out = topk_gumbel(logits_BV, 0.7, K, top_p, ClippedGumbel(), 1.0, SEED, counters(15), backend=backend)
    assert_shown(out, is_lost, V)


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_a_head(backend, greedy):
    generator = torch.Generator().manual_seed(1)
    hidden_BD, weight_VD = torch.randn(3, 16, generator=generator), torch.randn(V, 16, generator=generator)
    hidden_BD[1, 7] = torch.nan
    draw = lambda: vocab_head(hidden_BD, weight_VD, 0.7, SEED, counters(3), greedy, weight_VD, backend=backend)
    assert_shown(draw(), [False, True, False], V)
    weight_VD[299, 3] = torch.nan
    assert_shown(draw(), [True, True, True], V)
