"""Every loss variant's gradient against float64 autograd of the papers' formulas, and against TRL's loss."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from fastlatent_kernels import token_logprob

from fastlatent import advantages
from fastlatent.objectives import surrogate, token_weights
from fastlatent.packing import Item, pack
from fastlatent.schema import ObjectiveConfig
from fastlatent.types import Group, Request, Rollout, Scored

VOCAB = 24
LENGTHS = [3, 9, 5, 8]
NUM_TOKENS = sum(LENGTHS)
MAX_NEW = 9
REWARDS = [1.0, 0.0, 0.25, 0.0]


def rollout(length: int, sample: int) -> Rollout:
    """A completion of `length` actions; one of full length was cut."""
    generator = torch.Generator().manual_seed(sample)
    ids = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
    return Rollout(
        request=Request(tiny.prompts([4])[0], 0, sample), token_ids=ids, target_ids=ids, acted=[True] * length,
        latent=[False] * length, thinking=[True] * length, logprobs=[0.0] * length, log_kept=[0.0] * length,
        entropy=[0.0] * length, trace=None, finish="length" if length == MAX_NEW else "stop", forced_end=False,
        version=0)


ROLLOUTS = [rollout(length, sample) for sample, length in enumerate(LENGTHS)]
GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(NUM_TOKENS, VOCAB, generator=GENERATOR) * 2
TARGETS = torch.tensor([t for r in ROLLOUTS for t in r.target_ids])
# half the tokens well outside any clip range, a reference not far away
OLD_SHIFT = torch.randn(NUM_TOKENS, generator=GENERATOR) * 0.6
REF_SHIFT = torch.randn(NUM_TOKENS, generator=GENERATOR) * 0.4
ON_POLICY = ObjectiveConfig()
VARIANTS = {
    "grpo": ObjectiveConfig(normalizer="sequence_mean", clip_low=0.2, clip_high=0.2),
    "dapo": ObjectiveConfig(normalizer="token_mean", clip_low=0.2, clip_high=0.28),
    "dr_grpo": ObjectiveConfig(normalizer="constant", advantage="mean_only"),
    "constant-length": ObjectiveConfig(normalizer="constant", constant_length=40),
    "leave-one-out": ObjectiveConfig(advantage="leave_one_out"),
    "dual-clip": ObjectiveConfig(dual_clip=1.5),
    "k1": ObjectiveConfig(kl_coef=0.3, kl_estimator="k1"),
    "k2": ObjectiveConfig(kl_coef=0.3, kl_estimator="k2"),
    "k3": ObjectiveConfig(kl_coef=0.3, kl_estimator="k3"),
    "entropy": ObjectiveConfig(entropy_coef=0.2),
    "masked": ObjectiveConfig(mask_truncated_completions=True),
    "everything": ObjectiveConfig(normalizer="sequence_mean", clip_high=0.28, dual_clip=1.5, kl_coef=0.1,
                                  entropy_coef=0.05, mask_truncated_completions=True),
}


def logprobs(temperature: float) -> torch.Tensor:
    return (LOGITS.double() / temperature).log_softmax(-1).gather(1, TARGETS[:, None])[:, 0]


def group(rewards: list[float]) -> Group:
    return Group([], torch.tensor(rewards, dtype=torch.float64), {})


def ours(objective: ObjectiveConfig, temperature: float, is_off_policy: bool) -> tuple[float, torch.Tensor, dict]:
    """Loss, gradient of the logits and statistics of the package's own path."""
    weights = token_weights(ROLLOUTS, objective, MAX_NEW)
    advantage = advantages.of_group(group(REWARDS), objective).tolist()
    items = [Item(*row) for row in zip(ROLLOUTS, advantage, weights, strict=True)]
    batch = pack(items, torch.device("cpu"), share_prompts=True)
    assert torch.equal(batch.target_A, TARGETS)
    if is_off_policy:
        batch.old_logprob_A = (logprobs(temperature) + OLD_SHIFT).float()
    if objective.kl_coef:
        batch.ref_logprob_A = (logprobs(temperature) + REF_SHIFT).float()
    # an identity for a head: hidden states are the logits
    logits = LOGITS.clone().requires_grad_()
    loss = surrogate(Scored(*token_logprob(logits, torch.eye(VOCAB), batch.target_A, temperature)), batch, objective)
    loss.value.backward()
    return loss.value.item(), logits.grad, {name: value.item() for name, value in loss.sums.items()}


def by_hand(objective: ObjectiveConfig, temperature: float, is_off_policy: bool) -> tuple[float, torch.Tensor]:
    """The papers' formulas, a completion at a time, in float64."""
    logits = LOGITS.double().requires_grad_()
    logp = (logits / temperature).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    lp = logp.gather(1, TARGETS[:, None])[:, 0]
    old = logprobs(temperature) + OLD_SHIFT.double() if is_off_policy else lp.detach()
    ref = logprobs(temperature) + REF_SHIFT.double()
    ratio, low, high = (lp - old).exp(), 1 - objective.clip_low, 1 + objective.clip_high
    kl = {"k1": lp - ref, "k2": (lp - ref) ** 2 / 2, "k3": (ref - lp).exp() - (ref - lp) - 1}[objective.kl_estimator]
    used = [not (objective.mask_truncated_completions and r.finish == "length") for r in ROLLOUTS]
    divisor = {
        "token_mean": lambda length: sum(n for n, is_used in zip(LENGTHS, used, strict=True) if is_used),
        "sequence_mean": lambda length: length * sum(used),
        "constant": lambda length: sum(used) * (objective.constant_length or MAX_NEW)}[objective.normalizer]
    total, start = torch.zeros((), dtype=torch.float64), 0
    for length, a, is_used in zip(LENGTHS, advantages_by_hand(REWARDS, objective), used, strict=True):
        tokens = slice(start, start := start + length)
        if not is_used:
            continue
        loss = -torch.minimum(ratio[tokens] * a, ratio[tokens].clip(low, high) * a)
        if objective.dual_clip and a < 0:
            loss = torch.minimum(loss, torch.tensor(-objective.dual_clip * a))
        loss = loss + objective.kl_coef * kl[tokens] - objective.entropy_coef * entropy[tokens]
        total = total + loss.sum() / divisor(length)
    total.backward()
    return total.item(), logits.grad


def advantages_by_hand(rewards: list[float], objective: ObjectiveConfig) -> np.ndarray:
    r = np.array(rewards)
    match objective.advantage:
        case "z_score":
            return (r - r.mean()) / (r.std(ddof=1) + objective.advantage_eps)
        case "mean_only":
            return r - r.mean()
        case "leave_one_out":
            return np.array([r[i] - np.delete(r, i).mean() for i in range(len(r))])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("is_off_policy", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradient_are_those_of_the_formulas(variant, is_off_policy, temperature):
    objective = VARIANTS[variant]
    loss, gradient, sums = ours(objective, temperature, is_off_policy)
    wanted, wanted_gradient = by_hand(objective, temperature, is_off_policy)
    assert loss == pytest.approx(wanted, abs=1e-6)
    assert wanted_gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient.double(), wanted_gradient, atol=2e-7, rtol=1e-4)
    assert (sums["clip_low"] > 0 and sums["clip_high"] > 0) == is_off_policy
    assert (sums["dual_clipped"] > 0) == (is_off_policy and objective.dual_clip is not None)


def test_every_option_of_the_loss_changes_the_gradient():
    """A variant that differs in nothing would prove nothing."""
    gradients = {name: ours(objective, 0.7, True)[1] for name, objective in VARIANTS.items()}
    names = list(gradients)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert not torch.allclose(gradients[first], gradients[second], rtol=1e-3, atol=1e-6), (first, second)


# ---- trl ------------------------------------------------------------------------------------------------------------


def pad(values: torch.Tensor) -> torch.Tensor:
    """[A, ...] -> [S, L, ...], zeros behind each completion."""
    return torch.nn.utils.rnn.pad_sequence(values.split(LENGTHS), batch_first=True)


def by_trl(loss_type: str, objective: ObjectiveConfig, temperature: float,
           is_off_policy: bool) -> tuple[float, torch.Tensor]:
    """`GRPOTrainer._compute_loss` on our logits: a trainer whose forward pass returns what it is given."""
    from trl import GRPOTrainer

    logits = LOGITS.clone().requires_grad_()
    logp = (logits / temperature).log_softmax(-1)
    lp, entropy = logp.gather(1, TARGETS[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    trainer = object.__new__(GRPOTrainer)
    model = torch.nn.Module()
    vars(trainer).update(
        model=model, aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="token", beta=objective.kl_coef, loss_type=loss_type, epsilon_low=objective.clip_low,
        epsilon_high=objective.clip_high, use_vllm=False, current_gradient_accumulation_steps=1,
        max_completion_length=MAX_NEW, _entropy_bonus_enabled=objective.entropy_coef != 0,
        entropy_coef=objective.entropy_coef, use_adaptive_entropy=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=objective.dual_clip, steps_per_generation=1),
        accelerator=SimpleNamespace(num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, **_: x),
        _get_per_token_logps_and_entropies=lambda *_, **__: (pad(lp), pad(entropy), None))
    ids, mask = pad(TARGETS), pad(torch.ones(NUM_TOKENS, dtype=torch.int64))
    inputs = {"prompt_ids": ids[:, :1], "prompt_mask": mask[:, :1], "completion_ids": ids, "completion_mask": mask,
              "advantages": torch.tensor(advantages_by_hand(REWARDS, objective)).float(),
              "num_items_in_batch": torch.tensor(NUM_TOKENS)}
    if is_off_policy:
        inputs["old_per_token_logps"] = pad((logprobs(temperature) + OLD_SHIFT).float())
    if objective.kl_coef:
        inputs["ref_per_token_logps"] = pad((logprobs(temperature) + REF_SHIFT).float())
    loss = trainer._compute_loss(model, inputs)
    loss.backward()
    return loss.item(), logits.grad


OPTIONS = {
    "plain": {}, "clip-higher": {"clip_high": 0.28}, "delta": {"dual_clip": 1.5}, "kl": {"kl_coef": 0.3},
    "all": {"clip_low": 0.1, "clip_high": 0.28, "dual_clip": 2.0, "kl_coef": 0.04}}


@pytest.mark.parametrize("is_off_policy", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("loss_type, normalizer, advantage", [
    ("grpo", "sequence_mean", "z_score"), ("bnpo", "token_mean", "z_score"), ("dapo", "token_mean", "z_score"),
    ("dr_grpo", "constant", "mean_only")])
def test_loss_and_gradient_are_those_of_trl(loss_type, normalizer, advantage, options, is_off_policy):
    objective = ObjectiveConfig(normalizer=normalizer, advantage=advantage, **OPTIONS[options])
    loss, gradient, _ = ours(objective, 0.9, is_off_policy)
    wanted, wanted_gradient = by_trl(loss_type, objective, 0.9, is_off_policy)
    assert loss == pytest.approx(wanted, abs=1e-6)
    torch.testing.assert_close(gradient, wanted_gradient, atol=2e-7, rtol=1e-4)


def test_the_entropy_bonus_is_that_of_trl_where_both_are_means_over_tokens():
    objective = ObjectiveConfig(entropy_coef=0.2)
    loss, gradient, _ = ours(objective, 0.9, True)
    wanted, wanted_gradient = by_trl("bnpo", objective, 0.9, True)
    assert loss == pytest.approx(wanted, abs=1e-6)
    torch.testing.assert_close(gradient, wanted_gradient, atol=2e-7, rtol=1e-4)


# ---- advantages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["z_score", "mean_only", "leave_one_out"])
@pytest.mark.parametrize("rewards", [REWARDS, [0.0, 1.0], [3.5, -2.0, 1e6, 4.0, 4.0]])
def test_advantages_are_numpys(rewards, kind):
    objective = ObjectiveConfig(advantage=kind, advantage_eps=1e-3)
    wanted = advantages_by_hand(rewards, objective)
    np.testing.assert_allclose(advantages.of_group(group(rewards), objective), wanted, rtol=1e-6)


@pytest.mark.parametrize("kind", ["z_score", "mean_only", "leave_one_out"])
def test_a_rollout_without_reward_stands_outside_its_group(kind):
    objective = ObjectiveConfig(advantage=kind)
    among = advantages.of_group(group([math.nan, *REWARDS[:2], math.nan, *REWARDS[2:]]), objective)
    assert among[0] == among[3] == 0
    assert torch.equal(among[[1, 2, 4, 5]], advantages.of_group(group(REWARDS), objective))


@pytest.mark.parametrize("rewards", [[1.0] * 4, [0.1] * 3, [math.nan, 2.0], [math.nan] * 2, [1e-300] * 2])
@pytest.mark.parametrize("kind", ["z_score", "mean_only", "leave_one_out"])
def test_equal_rewards_teach_nothing(kind, rewards):
    got = advantages.of_group(group(rewards), replace(ON_POLICY, advantage=kind, advantage_eps=0.0))
    assert torch.equal(got, torch.zeros(len(rewards)))
    assert not advantages.has_variance(group(rewards))


def test_two_different_rewards_teach():
    assert advantages.has_variance(group([math.nan, 0.5, 0.25]))
