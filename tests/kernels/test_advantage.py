"""Advantages against numpy by hand, and the groups that teach nothing."""

import numpy as np
import pytest
import torch
from fastlatent_kernels import group_advantage

KINDS = ["z_score", "mean_only", "leave_one_out"]
BACKENDS = ["reference", "triton"]
REWARD = torch.tensor([[1.0, 0.0, 0.5, 9.0], [2.0, 2.5, -1.0, 0.25]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True, False], [True, True, True, True]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_advantages_equal_numpy_by_hand(kind, backend):
    got = group_advantage(REWARD, MASK, kind, 1e-3, backend=backend)
    assert got.dtype == torch.float32
    for row, mask, out in zip(REWARD.numpy(), MASK.numpy(), got.numpy(), strict=True):
        r = row[mask]
        want = np.zeros(4)
        if kind == "z_score":
            want[mask] = (r - r.mean()) / (r.std(ddof=1) + 1e-3)
        elif kind == "mean_only":
            want[mask] = r - r.mean()
        else:
            want[mask] = [r[i] - np.delete(r, i).mean() for i in range(len(r))]
        np.testing.assert_allclose(out, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_rewards_teach_nothing(kind, backend):
    # means of equal rewards that round away from them, in torch's order of summation and in Triton's
    third, tenth = (torch.full((1, 7), value, dtype=torch.float64) for value in (1 / 3, 0.1))
    everything = torch.ones(1, 7, dtype=torch.bool)
    one = torch.zeros(1, 7, dtype=torch.bool).index_fill(1, torch.tensor([3]), True)
    noise = torch.linspace(0, 1, 7, dtype=torch.float64)[None]
    for reward, mask in ((third, everything), (noise, one), (noise, torch.zeros_like(one)),
                         (torch.where(one, torch.nan, third), ~one), (tenth, ~one)):
        assert torch.equal(group_advantage(reward, mask, kind, 0.0, backend=backend), torch.zeros(1, 7))
    assert (group_advantage(noise, everything, kind, 0.0, backend=backend) != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rewards_may_hold_anything(backend):
    for garbage in (torch.nan, torch.inf, 1e300):
        reward = torch.where(MASK, REWARD, garbage)
        assert torch.equal(group_advantage(reward, MASK, "z_score", 1e-3, backend=backend),
                           group_advantage(REWARD, MASK, "z_score", 1e-3, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_float64_and_groups_do_not_touch(kind, backend):
    # float32 would lose the differences of 1e-4 between rewards near 1e4
    reward = 1e4 + 1e-4 * torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0], [3.0, 1.0, 1.5]], dtype=torch.float64)
    mask = torch.ones(3, 3, dtype=torch.bool)
    got = group_advantage(reward, mask, kind, 0.0, backend=backend)
    small = group_advantage(reward - 1e4, mask, kind, 0.0, backend=backend)
    torch.testing.assert_close(got[::2], small[::2], rtol=1e-6, atol=0)
    assert torch.equal(got[1], torch.zeros(3))
    for order in ([2, 0], [1], [0, 1, 2, 2, 0] * 30):
        assert torch.equal(group_advantage(reward[order], mask[order], kind, 0.0, backend=backend), got[order])


@pytest.mark.parametrize("kind", KINDS)
def test_backends_agree_on_rewards_that_are_not_numbers(kind):
    reward = torch.tensor([[torch.nan, 1.0, 2.0], [torch.inf, 1.0, 2.0], [torch.inf, torch.inf, 1.0]]).double()
    got, want = (group_advantage(reward, torch.ones(3, 3, dtype=torch.bool), kind, 0.0, backend=backend)
                 for backend in ("triton", "reference"))
    torch.testing.assert_close(got, want, equal_nan=True)


def test_unknown_kinds_and_single_precision_are_refused():
    with pytest.raises(ValueError, match="^kind: expected z_score, mean_only, leave_one_out, got 'median'"):
        group_advantage(REWARD, MASK, "median", 0.0)
    with pytest.raises(ValueError, match="^reward_SG: expected a float64 tensor"):
        group_advantage(REWARD.float(), MASK, "z_score", 0.0)
