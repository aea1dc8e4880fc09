"""What Latent-GRPO changes of GRPO, each on a group made for it: cut completions, first mixtures, the sides of the noise."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from mixtures import LATENT_GRPO, OBJECTIVE, SEED, SOFT_GRPO, counters, group_of, policy_of, rollouts_of

from fastlatent.methods import gumbel_mixture
from fastlatent.packing import Item, pack
from fastlatent.policy import Policy
from fastlatent.types import Group, Rollout


def drawn_group(policy: Policy, rewards: list[float], cut: int | None = None) -> Group:
    """Four completions of one prompt with rewards as they are needed; `cut` ran into its limit."""
    rollouts = rollouts_of(policy)[: len(rewards)]
    for index, rollout in enumerate(rollouts):
        rollout.finish = "length" if index == cut else "stop"
    group = Group(rollouts, torch.tensor(rewards, dtype=torch.float64), {})
    group.advantage_G = policy.method.advantages(group, OBJECTIVE)
    return group


def gradient(policy: Policy, rollouts: list[Rollout], advantages: list) -> torch.Tensor:
    """Of the loss that these completions make with these advantages, by all of the last block's weights."""
    batch = pack([Item(r, a, 1 / 100) for r, a in zip(rollouts, advantages, strict=True)], torch.device("cpu"))
    policy.base.zero_grad()
    policy.method.loss(policy, batch, 0.8, OBJECTIVE).value.backward()
    return torch.cat([p.grad.flatten() for p in policy.base.model.layers[-1].parameters()])


# ---- completions that were cut --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("truncated", "wanted"), [
    # rewards 1 0 0 1 have mean .5 and deviation .57735; without the last: mean 1/3, deviation .57735
    ("kept", [0.866025, -0.866025, -0.866025, 0.866025]),
    ("masked", [0.866025, -0.866025, -0.866025, 0.0]),
    ("excluded", [1.154701, -0.577350, -0.577350, 0.0])])
def test_completions_that_were_cut(truncated, wanted):
    method = policy_of(LATENT_GRPO, truncated=truncated).method
    got = method.advantages(group_of([1, 0, 0, 1], [False, False, False, True]), OBJECTIVE)
    assert got.tolist() == pytest.approx(wanted, abs=1e-5) and got.dtype == torch.float32
    none_cut = method.advantages(group_of([1, 0, 0, 1], [False] * 4), OBJECTIVE)
    assert none_cut.tolist() == pytest.approx([0.866025, -0.866025, -0.866025, 0.866025], abs=1e-5)


def test_one_whole_completion_keeps_its_reward_and_none_teach_nothing():
    method = policy_of(LATENT_GRPO, truncated="excluded").method
    assert method.advantages(group_of([0, 1, 1], [True, False, True]), OBJECTIVE).tolist() == pytest.approx([0, 1, 0], abs=1e-5)
    assert method.advantages(group_of([0, 1, 1], [True] * 3), OBJECTIVE).tolist() == [0, 0, 0]


def test_a_right_completion_that_was_cut_is_not_learnt_from_but_counts():
    """What follows is the gradient of its siblings alone, with the advantages that the whole group gave them."""
    rewards, cut = [1.0, 0.0, 0.0, 1.0], 3
    masked, kept = policy_of(LATENT_GRPO, select_first=False), policy_of(LATENT_GRPO, select_first=False, truncated="kept")
    group, plain = drawn_group(masked, rewards, cut), drawn_group(kept, rewards, cut)
    assert group.advantage_G.tolist() == [*plain.advantage_G.tolist()[:3], 0.0]
    ours = gradient(masked, group.rollouts, masked.method.action_advantages(group))
    siblings = gradient(masked, group.rollouts[:3], plain.advantage_G.tolist()[:3])
    torch.testing.assert_close(ours, siblings, atol=1e-6, rtol=1e-4)
    theirs = gradient(kept, plain.rollouts, kept.method.action_advantages(plain))
    assert (ours - theirs).norm() > 0.1 * theirs.norm()


# ---- the first position ---------------------------------------------------------------------------------------------


def test_of_two_right_first_mixtures_one_alone_pulls_at_the_prompt():
    """Both were drawn from one distribution; what is learnt at it is the winner's, and everywhere else nothing changes."""
    policy, plain = policy_of(LATENT_GRPO), policy_of(LATENT_GRPO, select_first=False)
    group = drawn_group(policy, [1.0, 1.0, 0.0, 0.0])
    first = [set(r.trace.record["ids"][0].tolist()) for r in group.rollouts[:2]]
    assert first[0] != first[1]
    winner = policy.method.first_winner(group)
    assert winner in (0, 1)
    advantages = policy.method.action_advantages(group)
    at_first = [[row[0]] + [0.0] * (len(row) - 1) for row in advantages]
    ours = gradient(policy, group.rollouts, at_first)
    alone = gradient(policy, [group.rollouts[winner]], [at_first[winner]])
    torch.testing.assert_close(ours, alone, atol=1e-6, rtol=1e-4)
    plainly = zip(plain.method.action_advantages(group), group.rollouts, strict=True)
    everyone = [[a] + [0.0] * (sum(r.acted) - 1) for a, r in plainly]
    assert (gradient(plain, group.rollouts, everyone) - ours).norm() > 0.1 * ours.norm()
    for a, row in zip(group.advantage_G.tolist(), advantages, strict=True):
        assert row[1:] == [a] * (len(row) - 1)


def test_of_the_right_completions_the_likeliest_per_token_alone_is_learnt_from_at_its_first_position():
    # means -1.0, -0.5 (of four tokens, the least sum), -0.1 (wrong)
    group = group_of([1, 1, 0, 0], [False] * 4, [[-1.0], [-0.5] * 4, [-0.1] * 2, [-2.0]])
    method = policy_of(LATENT_GRPO).method
    group.advantage_G = torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert method.action_advantages(group) == [[0.0], [1.0] * 4, [0.0, -1.0], [0.0]]
    assert method.group_statistics(group)["latent/frac_first_selected"].tolist() == [1, 1]
    group.rollouts[1].finish = "length"  # masked, it cannot be chosen
    group.advantage_G = method.advantages(group, OBJECTIVE)
    assert method.first_winner(group) == 0
    group.advantage_G = torch.tensor([0.0, 0.0, -1.0, -1.0])  # no candidate: unchanged
    assert method.action_advantages(group) == [0.0, 0.0, -1.0, -1.0]
    group.advantage_G = torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert policy_of(SOFT_GRPO).method.action_advantages(group) == [1.0, 1.0, -1.0, -1.0]


def test_a_completion_of_one_action_with_none_left_is_not_read_for_nothing():
    rollout = SimpleNamespace(acted=[True, True, False])
    assert not Item(rollout, [0.0, 0.0], 1.0).teaches and Item(rollout, [0.0, -1.0], 1.0).teaches
    assert Item(rollout, 2.0, 1.0).advantages == [2.0, 2.0] and not Item(rollout, 0.0, 1.0).teaches


# ---- the sides of the noise -----------------------------------------------------------------------------------------


def slopes(config, advantage: float, moved: float = 0.0) -> torch.Tensor:
    """By how much the objective of 500 drawn mixtures rises with each of their tokens' log-probability, times K, once the
    policy has raised them all by `moved`."""
    logits = 2 * torch.randn(500, 40, generator=torch.Generator().manual_seed(4))
    drawn = gumbel_mixture.draw(config, logits, False, SEED, counters(500))
    logprob = (drawn.logprob_BK + moved).requires_grad_()
    bounded = torch.full((500,), advantage <= 0) if config.bound_negative else None
    (advantage * gumbel_mixture.log_density(config, drawn.score_BK, logprob, bounded)).sum().backward()
    return config.top_k * logprob.grad


def test_one_sided_noise_moves_no_token_against_its_advantage():
    """A right mixture's tokens all rise and a wrong one's all fall, which with two sides a part of them does not."""
    one, two = LATENT_GRPO.Config(), LATENT_GRPO.Config(one_sided=False, bound_negative=False)
    rounding = 1e-5  # of a noise of 0
    assert slopes(one, 1.0).min() > -rounding and slopes(one, 1.0).max() < 1
    assert slopes(one, -1.0).max() < rounding
    assert (slopes(two, 1.0) < -0.1).float().mean() > 0.1 and (slopes(two, -1.0) > 0.1).float().mean() > 0.1
    assert slopes(two, 1.0).min() < -3  # 1 - exp(1.5), and it grows with every step away


def test_what_the_policy_has_moved_past_is_pushed_no_harder_than_anything_else():
    """Raised by 2, a part of the tokens of a wrong mixture lies above its noise: d < 0."""
    bound, free = LATENT_GRPO.Config(), LATENT_GRPO.Config(bound_negative=False)
    assert slopes(free, -1.0, moved=2.0).max() > 5  # exp(2) - 1
    assert 0 < slopes(bound, -1.0, moved=2.0).max() < 1
    assert torch.equal(slopes(bound, 1.0, moved=2.0), slopes(free, 1.0, moved=2.0))  # a right one is as it was
