"""Latent-GRPO and SofT-GRPO in a rollout and a batch: where latents end, which actions they are, what the log says of them."""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from mixtures import FORCED, LATENT_GRPO, SEED, UNFORCED, batch_of, counters, policy_of, rollouts_of

from fastlatent import step_metrics
from fastlatent.alarms import CollapseAlarm
from fastlatent.methods import latent_grpo
from fastlatent.methods.base import METHODS, StepView
from fastlatent.schema import AnswerConfig, ObjectiveConfig, ThinkingConfig
from fastlatent.types import Sampling
from fastlatent.update import UpdateResult


# ---- where latents end ----------------------------------------------------------------------------------------------


def view_of(logits_BV: torch.Tensor, temperature: float, end: int) -> StepView:
    B = len(logits_BV)
    drawn = logits_BV.argmin(1)  # whatever the head drew
    logprob_B = (logits_BV / temperature).log_softmax(1).gather(1, drawn[:, None])[:, 0]
    is_end = torch.zeros(logits_BV.shape[1], dtype=torch.bool)
    is_end[end] = True
    zeros = torch.zeros(B)
    return StepView(
        token_B=drawn, read_B=drawn, logprob_B=logprob_B, log_kept_B=zeros - 0.1, entropy_B=zeros, hidden_BD=zeros,
        thinking_B=torch.arange(B) % 2 == 0, seed=SEED, counter_B3=counters(B), logits_BV=logits_BV,
        sampling=Sampling(temperature=temperature), is_end_V=is_end)


@pytest.mark.parametrize("rule", ["likeliest", "contest"])
def test_which_token_ends_thinking(rule):
    B, end = 400, 3
    logits = torch.randn(B, 20, generator=torch.Generator().manual_seed(3))
    logits[:, end] = logits.amax(1) + 0.2  # the likeliest everywhere, by less than the noise
    method = policy_of(LATENT_GRPO, end_rule=rule).method
    view, head = view_of(logits, 0.6, end), view_of(logits, 0.6, end)
    method.draw(view, {})
    ends = view.token_B == end
    assert ends[::2].all() if rule == "likeliest" else 0.05 < ends[::2].float().mean() < 0.8
    assert torch.equal(view.token_B[1::2], head.token_B[1::2])  # not thinking: the head's own draw
    assert torch.equal(view.log_kept_B[1::2], head.log_kept_B[1::2]) and (view.log_kept_B[::2] == 0).all()
    wanted = (logits.double() / 0.6).log_softmax(1).gather(1, view.token_B[:, None])[:, 0]
    torch.testing.assert_close(view.logprob_B.double(), wanted, atol=1e-5, rtol=0)


def test_the_token_that_ends_thinking_is_an_action_and_read_as_itself():
    policy = policy_of(LATENT_GRPO)
    rollouts = rollouts_of(policy, ends=(ThinkingConfig(end="a"), AnswerConfig()), max_new_tokens=48)
    end = tiny.tokenizer().encode("a", add_special_tokens=False)
    assert len(end) == 1
    seen = 0
    for r in rollouts:
        k = next((k for k, index in enumerate(r.token_ids) if "a" in tiny.tokenizer().decode([index])), None)
        if k is None:
            assert all(r.latent) and r.latent_acted == r.latent
            continue
        seen += 1
        assert r.latent == r.latent_acted == [True] * k + [False] * (len(r.latent) - k) and all(r.acted)
        assert r.thinking == [True] * (k + 1) + [False] * (len(r.latent) - k - 1)
    assert seen > 0


# ---- in a batch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share_prompts", [True, False])
def test_a_batch_says_which_actions_are_latents_and_what_was_drawn(share_prompts):
    policy = policy_of(LATENT_GRPO)
    rollouts = rollouts_of(policy)
    batch = batch_of(policy, rollouts, share_prompts)
    actions = batch.actions
    assert sorted([*actions.latent_N.tolist(), *actions.token_M.tolist()]) == list(range(len(batch.score_A)))
    assert torch.equal(batch.behaviour_logprob_A[actions.latent_N], torch.cat([r.trace.logprob_N for r in rollouts]))
    for name, column in actions.record_N.items():
        assert torch.equal(column, torch.cat([r.trace.record[name] for r in rollouts])), name
    # the last token of a completion is drawn, not read: its action is scored all the same
    cut = rollouts_of(policy, ends=UNFORCED, max_new_tokens=4)
    assert all(r.latent == [True] * 4 for r in cut)
    assert len(batch_of(policy, cut).actions.latent_N) == 4 * len(cut)


# ---- the law --------------------------------------------------------------------------------------------------------

QUICKSTART = {"top_k": 4, "candidates": "renormalised", "one_sided": False}


@pytest.mark.parametrize("ends", [FORCED, (ThinkingConfig(end="a"), AnswerConfig())], ids=["forced", "own"])
@pytest.mark.parametrize("sampling", [{}, {"greedy": True}, {"top_k": 20, "top_p": 0.9}], ids=["drawn", "greedy", "truncated"])
@pytest.mark.parametrize("options", [
    QUICKSTART, {"delta": 0.3}, {"noise_scale": 0.5}, {"mixture_temperature": 0.3, "end_rule": "contest"}, {"top_k": 1}],
    ids=lambda options: "-".join(options))
def test_replay_gives_back_log_probabilities_whatever_the_options(options, sampling, ends):
    policy = policy_of(LATENT_GRPO, **options)
    rollouts = rollouts_of(policy, ends, **sampling)
    assert sum(sum(r.latent_acted) for r in rollouts) > 20
    batch = batch_of(policy, rollouts)
    with torch.no_grad():
        gap_A = (policy.method.score(policy, batch, 0.8).logprob_A - batch.behaviour_logprob_A).abs()
        assert gap_A.max() <= 2e-4
        batch.record_T = {name: column.roll(1, 0) for name, column in batch.record_T.items()}  # the fault: its neighbours' read
        fault_A = (policy.method.score(policy, batch, 0.8).logprob_A - batch.behaviour_logprob_A).abs()
    assert fault_A.max() > 1e-2


# ---- one file -------------------------------------------------------------------------------------------------------


def test_the_method_works_from_a_file_of_ones_own(tmp_path, monkeypatch):
    """Its source under another name, found by its dotted path: nothing outside the file knows of it."""
    source = inspect.getsource(latent_grpo)
    assert source.count("latent_grpo") == 2
    (tmp_path / "own_latents.py").write_text(source.replace('@METHODS.register("latent_grpo")\n', "").replace(
        'name: str = "latent_grpo"', 'name: str = "own_latents.LatentGRPO"'))
    monkeypatch.syspath_prepend(tmp_path)
    own = METHODS.find("own_latents.LatentGRPO", "method.name")
    assert own is not LATENT_GRPO
    ours, theirs = policy_of(own), policy_of(LATENT_GRPO)
    drawn = rollouts_of(ours)
    assert [r.token_ids for r in drawn] == [r.token_ids for r in rollouts_of(theirs)]
    losses = [p.method.loss(p, batch_of(p, drawn), 0.8, ObjectiveConfig()).value for p in (ours, theirs)]
    assert torch.equal(*losses)


# ---- the log --------------------------------------------------------------------------------------------------------


def completion(latent: str, thinking: str, *, forced_end=False, finish="stop") -> SimpleNamespace:
    """A sample of as many tokens as the words have letters; x: it is latent, or drawn while thinking."""
    is_latent, is_thinking = ([letter == "x" for letter in word] for word in (latent, thinking))
    n = len(is_latent)
    return SimpleNamespace(rollout=SimpleNamespace(
        token_ids=[1] * n, latent=is_latent, thinking=is_thinking, num_thinking=sum(is_thinking), acted=[True] * n,
        entropy=[0.5] * n, forced_end=forced_end, finish=finish, trace=object() if any(is_latent) else None))


def logged(*samples: SimpleNamespace, has_latents=True) -> dict[str, float]:
    metrics = step_metrics.of_step(1, [], samples, step_metrics.Drawn(), UpdateResult(), 0.1, has_latents=has_latents)
    return {name: value for name, value in metrics.items() if name.startswith("latent/")}


def test_lengths_shares_and_exits_of_latents_are_counted_by_hand():
    ended, cut = completion("xx---", "xxx--"), completion("xxxx", "xxxx", finish="length")
    forced = completion("xxx---", "xxx---", forced_end=True)
    assert logged(ended, cut, cut, cut, forced, forced) == pytest.approx({
        "latent/frac_tokens": 20 / 29, "latent/steps_per_completion/mean": 20 / 6, "latent/exit_end": 1 / 6,
        "latent/exit_cut": 3 / 6, "latent/exit_forced": 2 / 6})
    assert logged(ended, cut, has_latents=False) == {}


def test_latents_that_are_gone_at_once_are_a_collapse():
    """A step without a single latent says so: an alarm that is told nothing stays quiet. It sounds with the fourth."""
    alarm = CollapseAlarm()
    ended, empty = logged(completion("xx---", "xxx--")), logged(completion("--", "x-"))
    assert empty["latent/frac_tokens"] == 0 and empty["latent/exit_end"] == 1
    told = [text for row in [ended] * 8 + [empty] * 5 for text in alarm.step(row)]
    assert len(told) == 1 and told[0].startswith("collapse: the latent share of the completions fell from 0.40 to 0.08")


def test_the_log_tells_latents_from_tokens():
    policy = policy_of(LATENT_GRPO)
    batch = batch_of(policy, rollouts_of(policy))
    batch.old_logprob_A = batch.behaviour_logprob_A.clone()
    batch.old_logprob_A[batch.actions.latent_N] -= math.log(1.5)  # ratio 1.5: clipped where the advantage is positive
    got = policy.method.loss(policy, batch, 0.8, ObjectiveConfig()).statistics
    share = {name: float(total / count) for name, (total, count) in got.items()}
    positive = float((batch.advantage_A[batch.actions.latent_N] > 0).float().mean())
    assert share["latent/ratio_mean_latent"] == pytest.approx(1.5, abs=1e-3)
    assert share["latent/ratio_mean_token"] == pytest.approx(1.0, abs=1e-3)
    assert share["latent/clip_ratio_latent"] == pytest.approx(positive) and share["latent/clip_ratio_token"] == 0
    # nothing has been passed yet, but for the rounding of a noise of 0
    assert 0 < share["latent/noise_used"] < 1 and share["latent/frac_passed"] < 0.05
    weights = policy.method.statistics(batch.token_ids_T, batch.latent_T, batch.record_T)
    share = {name: float(total / count) for name, (total, count) in weights.items()}
    assert 1 < share["latent/effective_k"] <= math.exp(share["latent/mixture_entropy"]) <= 10


def test_without_noise_nothing_is_said_of_its_interval():
    policy = policy_of(LATENT_GRPO, noise_scale=0.0)
    got = policy.method.loss(policy, batch_of(policy, rollouts_of(policy)), 0.8, ObjectiveConfig()).statistics
    assert "latent/noise_used" not in got and got["latent/frac_passed"][1] > 100


def test_what_is_said_of_mixtures_is_worked_by_hand():
    """Weights 1/2, 1/4, 1/4 and, of a mixture of one, 1; a third place is no latent."""
    policy = policy_of(LATENT_GRPO, top_k=3)
    score = torch.tensor([[2.0, 1.0, 1.0], [0.0, -torch.inf, -torch.inf], [0.0, 0.0, 0.0]]) * math.log(2)
    ids = torch.tensor([[5, 6, 7], [8, 0, 0], [9, 9, 9]], dtype=torch.int32)
    record = {"ids": ids, "score": score}
    got = policy.method.statistics(torch.tensor([5, 5, 5]), torch.tensor([True, True, False]), record)
    assert got["latent/mixture_entropy"].tolist() == pytest.approx([1.5 * math.log(2), 2])
    assert got["latent/effective_k"].tolist() == pytest.approx([8 / 3 + 1, 2])
    table = policy.base.get_input_embeddings().weight.detach().double()
    mixed = [0.5 * table[5] + 0.25 * table[6] + 0.25 * table[7], table[8]]
    wanted = sum(float(m.norm() / table[5].norm()) for m in mixed)
    assert got["latent/norm_ratio"].tolist() == pytest.approx([wanted, 2], rel=1e-5)
