"""Advantages against numpy by hand, and the groups that teach nothing."""

import numpy as np
import pytest
import torch
from fastlatent_kernels import group_advantage

REWARD = torch.tensor([[1.0, 0.0, 0.5, 9.0], [2.0, 2.5, -1.0, 0.25]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True, False], [True, True, True, True]])


@pytest.mark.parametrize("kind", ["z_score", "mean_only", "leave_one_out"])
def test_advantages_equal_numpy_by_hand(kind):
    got = group_advantage(REWARD, MASK, kind, 1e-3)
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


@pytest.mark.parametrize("kind", ["z_score", "mean_only", "leave_one_out"])
def test_equal_rewards_teach_nothing(kind):
    third = torch.full((1, 7), 1 / 3, dtype=torch.float64)  # its mean rounds away from it
    everything = torch.ones(1, 7, dtype=torch.bool)
    one = torch.zeros(1, 7, dtype=torch.bool).index_fill(1, torch.tensor([3]), True)
    noise = torch.linspace(0, 1, 7, dtype=torch.float64)[None]
    for reward, mask in ((third, everything), (noise, one), (noise, torch.zeros_like(one)),
                         (torch.where(one, torch.nan, third), ~one)):
        assert torch.equal(group_advantage(reward, mask, kind, 0.0), torch.zeros(1, 7))
    assert (group_advantage(noise, everything, kind, 0.0) != 0).any()


def test_masked_rewards_may_hold_anything():
    for garbage in (torch.nan, torch.inf, 1e300):
        reward = torch.where(MASK, REWARD, garbage)
        assert torch.equal(group_advantage(reward, MASK, "z_score", 1e-3),
                           group_advantage(REWARD, MASK, "z_score", 1e-3))


def test_unknown_kinds_and_single_precision_are_refused():
    with pytest.raises(ValueError, match="^kind: expected z_score, mean_only, leave_one_out, got 'median'"):
        group_advantage(REWARD, MASK, "median", 0.0)
    with pytest.raises(ValueError, match="^reward_SG: expected a float64 tensor"):
        group_advantage(REWARD.float(), MASK, "z_score", 0.0)
