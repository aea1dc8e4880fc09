"""Latent-GRPO and SofT-GRPO: what is drawn, when latents end, what is learnt, against numbers worked by hand and float64."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from fastlatent_kernels.noise import STREAM_LATENT, row_gumbel

from fastlatent.config import load_config
from fastlatent.errors import UserError
from fastlatent.methods import gumbel_mixture
from fastlatent.methods.base import METHODS, StepView
from fastlatent.methods.gumbel_mixture import MixtureConfig
from fastlatent.objectives import token_weights
from fastlatent.packing import Item, pack
from fastlatent.policy import Policy
from fastlatent.schema import AnswerConfig, ModelConfig, ObjectiveConfig, ThinkingConfig
from fastlatent.types import Batch, Group, Rollout, Sampling

FORCED = (ThinkingConfig(end="####", force="\n#### ", max_tokens=12, stop=["\n"]), AnswerConfig(max_tokens=6, stop=["\n"]))
SEED = torch.tensor(11)
CPU = torch.device("cpu")
LATENT_GRPO, SOFT_GRPO = (METHODS.find(name, "") for name in ("latent_grpo", "soft_grpo"))


def policy_of(method, *, base=None, has_reference=False, **options) -> Policy:
    return Policy(base or tiny.model(), ModelConfig(path="tiny", dtype="float32", freeze_embedding=True), method,
                  method.Config(**options), has_reference=has_reference)


def rollouts_of(policy: Policy, ends=FORCED, **sampling) -> list[Rollout]:
    options = {"temperature": 0.8, "max_new_tokens": 32} | sampling
    return tiny.engine(policy, *ends).generate(tiny.requests(tiny.prompts([5, 9]), 4), Sampling(**options))


def counters(num_rows: int) -> torch.Tensor:
    row = torch.arange(num_rows)
    return torch.stack([row % 7, row // 7, row * 3 + 1], dim=1)


# ---- what is drawn --------------------------------------------------------------------------------------------------


def test_the_k_best_are_those_of_a_full_sort_on_the_same_noise():
    """A hundred thousand rows; the sort knows nothing of pruning."""
    B, V, K = 100_000, 40, 4
    config = MixtureConfig(top_k=K, top_p=0.8)
    logits = 2 * torch.randn(B, V, generator=torch.Generator().manual_seed(1))
    drawn = gumbel_mixture.draw(config, logits, False, SEED, counters(B))
    noise = row_gumbel(SEED, torch.arange(V), STREAM_LATENT, counters(B)).double().numpy().clip(-1.5, 3) + 1.5
    logprob = logits.double().numpy()
    logprob -= np.log(np.exp(logprob).sum(1, keepdims=True))
    order = np.argsort(-logprob, axis=1)
    p = np.exp(np.take_along_axis(logprob, order, 1))
    is_candidate = np.zeros((B, V), bool)
    np.put_along_axis(is_candidate, order, (np.cumsum(p, 1) - p < 0.8) | (np.arange(V) < K), axis=1)
    score = np.where(is_candidate, logprob + noise, -np.inf)
    best = np.sort(score, axis=1)[:, ::-1][:, :K]
    # a token at the very edge of the nucleus may be in for float32 and out for float64
    is_close = np.abs(drawn.score_BK.numpy() - best).max(1) < 1e-4
    assert is_close.mean() > 0.9999
    assert 2 < is_candidate.sum(1).mean() < V - 2 and (drawn.best_B != drawn.likeliest_B).float().mean() > 0.3


def test_renormalised_candidates_are_the_top_k_inside_the_nucleus():
    config = SOFT_GRPO.Config(top_k=3, top_p=0.7)
    p = torch.tensor([[0.5, 0.25, 0.15, 0.1], [0.9, 0.05, 0.03, 0.02], [0.3, 0.3, 0.2, 0.2]])
    drawn = gumbel_mixture.draw(config, p.log(), False, SEED, counters(3))
    kept = [[0.5, 0.25], [0.9], [0.3, 0.3, 0.2]]  # less than .7 before each
    for row, shares in enumerate(kept):
        ids = drawn.ids_BK[row, : len(shares)]
        noise = row_gumbel(SEED, ids, STREAM_LATENT, counters(3)[row : row + 1])[0].clamp(-1.5, 3.0)
        wanted = torch.log(torch.tensor(shares) / sum(shares) + 1e-6) + noise
        torch.testing.assert_close(drawn.score_BK[row, : len(shares)], wanted, atol=1e-5, rtol=1e-5)
        assert (drawn.score_BK[row, len(shares) :] == -torch.inf).all()
        assert drawn.best_B[row] == ids[wanted.argmax()]
        torch.testing.assert_close(drawn.logprob_BK[row, : len(shares)], torch.tensor(shares).log(), atol=1e-5, rtol=1e-5)


def test_noise_lies_in_its_interval_and_a_shift_adds_to_it():
    assert MixtureConfig().noise_bounds == (0.0, 4.5)
    assert MixtureConfig(delta=0.25).noise_bounds == (0.25, 4.75)
    assert SOFT_GRPO.Config().noise_bounds == (-1.5, 3.0)
    logits = torch.randn(500, 50, generator=torch.Generator().manual_seed(2))
    for config in (MixtureConfig(delta=0.25), SOFT_GRPO.Config()):
        drawn = gumbel_mixture.draw(config, logits, False, SEED, counters(500))
        d = gumbel_mixture.noise_of(config, drawn.score_BK, drawn.logprob_BK)
        d, (low, high) = d[drawn.score_BK > -torch.inf], config.noise_bounds
        assert low - 1e-3 <= d.min() < low + 0.3 and high - 0.01 < d.max() <= high + 1e-3


def test_one_token_without_noise_is_greedy_decoding():
    """K = 1: the mixture is the likeliest token's own embedding."""
    plain, latent = policy_of(METHODS.find("grpo", "")), policy_of(LATENT_GRPO, top_k=1)
    ours, theirs = rollouts_of(latent, greedy=True), rollouts_of(plain, greedy=True)
    assert [r.token_ids for r in ours] == [r.token_ids for r in theirs]
    assert any(r.trace is not None for r in ours)
    wide = rollouts_of(policy_of(LATENT_GRPO, top_k=10), greedy=True)
    assert [r.token_ids for r in wide] != [r.token_ids for r in theirs]  # else any input would do


def test_greedy_decoding_has_no_noise_and_sampling_has():
    policy = policy_of(LATENT_GRPO)
    for greedy, num_different in ((True, 1), (False, 4)):
        first = rollouts_of(policy, greedy=greedy)[:4]  # of one prompt
        assert len({tuple(r.token_ids) for r in first}) == num_different
        d = torch.cat([r.trace.logprob_N for r in first])
        assert bool((d == -1).all()) == greedy  # -d - exp(-d) at d = 0


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


# ---- what is learnt from --------------------------------------------------------------------------------------------


def group_of(rewards: list[float], cut: list[bool], logprobs: list[list[float]] | None = None) -> Group:
    logprobs = logprobs or [[-1.0] * 3] * len(rewards)
    rollouts = [SimpleNamespace(finish="length" if is_cut else "stop", logprobs=row, acted=[True] * len(row))
                for is_cut, row in zip(cut, logprobs, strict=True)]
    return Group(rollouts, torch.tensor(rewards, dtype=torch.float64), {})


OBJECTIVE = ObjectiveConfig(advantage_eps=1e-6)


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


def test_of_the_right_completions_the_likeliest_per_token_alone_is_learnt_from_at_its_first_position():
    # means -1.0, -0.5 (of four tokens, the least sum), -0.1 (wrong)
    group = group_of([1, 1, 0, 0], [False] * 4, [[-1.0], [-0.5] * 4, [-0.1] * 2, [-2.0]])
    method = policy_of(LATENT_GRPO).method
    group.advantage_G = torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert method.action_advantages(group) == [[0.0], [1.0] * 4, [0.0, -1.0], [0.0]]
    assert method.group_statistics(group)["latent/frac_first_selected"].tolist() == [1, 1]
    group.advantage_G = torch.tensor([0.0, 0.0, -1.0, -1.0])  # no candidate: unchanged
    assert method.action_advantages(group) == [0.0, 0.0, -1.0, -1.0]
    group.advantage_G = torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert policy_of(SOFT_GRPO).method.action_advantages(group) == [1.0, 1.0, -1.0, -1.0]


def test_a_completion_of_one_action_with_none_left_is_not_read_for_nothing():
    rollout = SimpleNamespace(acted=[True, True, False])
    assert not Item(rollout, [0.0, 0.0], 1.0).teaches and Item(rollout, [0.0, -1.0], 1.0).teaches
    assert Item(rollout, 2.0, 1.0).advantages == [2.0, 2.0] and not Item(rollout, 0.0, 1.0).teaches


def batch_of(policy: Policy, rollouts: list[Rollout], share_prompts: bool = True) -> Batch:
    weights = token_weights(rollouts, ObjectiveConfig(), 32)
    items = [Item(r, [(-1.0) ** (i + k) * (1 + 0.1 * k) for k in range(sum(r.acted))], w)
             for i, (r, w) in enumerate(zip(rollouts, weights, strict=True))]
    return pack(items, CPU, share_prompts)


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
    cut = rollouts_of(policy, ends=(ThinkingConfig(end="####"), AnswerConfig()), max_new_tokens=4)
    assert all(r.latent == [True] * 4 for r in cut)
    assert len(batch_of(policy, cut).actions.latent_N) == 4 * len(cut)


def exact(model64, policy: Policy, rollouts: list[Rollout], batch: Batch, temperature: float):
    """Log-probabilities, and their coefficients' gradient carriers, one rollout at a time through a stock float64 model."""
    config, table = policy.method.config, model64.get_input_embeddings().weight
    out = []
    for r in rollouts:
        prompt = r.request.prompt.token_ids
        inputs = table[torch.tensor([*prompt, *r.token_ids])].detach().clone()
        for k, ids, score in zip(r.trace.position_N.tolist(), r.trace.record["ids"], r.trace.record["score"], strict=True):
            w = (score.double() / config.mixture_temperature).exp()
            inputs[len(prompt) + k] = ((w / w.sum())[:, None] * table[ids.long()]).sum(0).detach()
        logits = model64(inputs_embeds=inputs[None]).logits[0]
        rows = iter(zip(r.trace.record["ids"], r.trace.record["score"], strict=True))
        for k, acted in enumerate(r.acted):
            row = next(rows) if r.latent[k] else None
            at = logits[len(prompt) + k - 1]
            if not acted:
                continue
            if row is None:
                out.append(((at / temperature).log_softmax(0)[r.target_ids[k]], None, None))
                continue
            ids, score = row[0].long(), row[1].double()
            logprob = at.log_softmax(0)[ids]
            if config.candidates == "renormalised":
                is_kept = score > -torch.inf
                logprob = logprob - logprob[is_kept].logsumexp(0)
                is_counted = is_kept & (logprob > config.logprob_floor)
                logprob, score = logprob[is_counted], score[is_counted]
            d = score - logprob
            if config.clamp_density:
                d = d.clamp(-1.5, 3.0)
            out.append(((-d - torch.exp(-d)).mean(), logprob, d))
    return out


@pytest.mark.parametrize("method", [LATENT_GRPO, SOFT_GRPO], ids=["latent_grpo", "soft_grpo"])
def test_the_gradient_of_the_loss_is_that_of_the_formula_in_float64(method):
    """Weights have moved since the rollout: ratios, clips and bounded slopes all take part."""
    base = tiny.model()
    with torch.no_grad():
        base.lm_head.weight.mul_(6)  # so sharp that a token's log-probability can pass its noise
    policy = policy_of(method, base=base)
    rollouts = rollouts_of(policy)
    batch = batch_of(policy, rollouts)
    with torch.no_grad():
        for parameter in policy.base.model.layers.parameters():
            parameter.mul_(1.5)
        now_A = policy.method.score(policy, batch, 0.8).logprob_A
    batch.old_logprob_A = now_A + 0.4 * torch.sin(torch.arange(len(now_A)))
    objective = ObjectiveConfig(dual_clip=3.0)
    model64 = tiny.model().double()
    model64.load_state_dict({name: p.double() for name, p in policy.base.state_dict().items()})

    loss = policy.method.loss(policy, batch, 0.8, objective)
    loss.value.backward()

    scored = exact(model64, policy, rollouts, batch, 0.8)
    value, carrier, num_bounded = 0.0, 0.0, 0
    for (logp, logprob, d), old, advantage, weight in zip(
            scored, batch.old_logprob_A.tolist(), batch.advantage_A.tolist(), batch.weight_A.tolist(), strict=True):
        ratio = math.exp(float(logp.detach()) - old)
        gain = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
        gain = max(gain, 3 * advantage) if advantage < 0 else gain
        value -= weight * gain
        if gain != ratio * advantage:
            continue  # clipped: no gradient
        slope = -weight * advantage * ratio
        if method is LATENT_GRPO and logprob is not None and advantage <= 0 and bool((d < 0).any()):
            num_bounded += int((d < 0).sum())
            c = torch.where(d < 0, torch.exp(d) - 1, 1 - torch.exp(-d)) / len(d)
            carrier = carrier + slope * (c.detach() * logprob).sum()
        else:
            carrier = carrier + slope * logp
    carrier.backward()
    assert (num_bounded > 5) == (method is LATENT_GRPO)
    assert float(loss.sums["clip_low"] + loss.sums["clip_high"]) > 3
    assert float(loss.value) == pytest.approx(value, abs=1e-5)
    wanted = dict(model64.named_parameters())
    for name, parameter in policy.base.named_parameters():
        if parameter.requires_grad:
            grad = wanted[name].grad
            assert (parameter.grad - grad).abs().max() <= 2e-4 * grad.abs().max() + 1e-7, name


def test_a_frozen_embedding_gets_no_gradient_and_a_free_one_gets_that_of_its_mixtures():
    frozen = policy_of(LATENT_GRPO)
    free = Policy(tiny.model(), ModelConfig(path="tiny", dtype="float32"), LATENT_GRPO, LATENT_GRPO.Config(), has_reference=False)
    rollouts = rollouts_of(frozen)
    for policy in (frozen, free):
        policy.method.loss(policy, batch_of(policy, rollouts), 0.8, ObjectiveConfig()).value.backward()
    assert frozen.base.get_input_embeddings().weight.grad is None
    grad_VD = free.base.get_input_embeddings().weight.grad
    mixed = {int(i) for r in rollouts for i in r.trace.record["ids"][:-1].flatten()}
    read = {i for r in rollouts for i in (*r.token_ids, *r.request.prompt.token_ids)}
    only_mixed = sorted(mixed - read)
    assert only_mixed and (grad_VD[only_mixed].abs().sum(1) > 0).all()


def test_the_reference_reads_the_same_mixtures():
    policy = policy_of(LATENT_GRPO, has_reference=True)
    batch = batch_of(policy, rollouts_of(policy))
    ours = policy.method.reference_logprob(policy, batch, 0.8)
    torch.testing.assert_close(ours, batch.behaviour_logprob_A, atol=2e-4, rtol=0)
    with torch.no_grad():
        for parameter in policy.base.model.layers.parameters():
            parameter.mul_(1.1)
    assert torch.equal(policy.method.reference_logprob(policy, batch, 0.8), ours)


def test_a_completion_of_latents_alone_can_be_learnt_from():
    policy = policy_of(LATENT_GRPO)
    rollouts = rollouts_of(policy, ends=(ThinkingConfig(end="####"), AnswerConfig()), max_new_tokens=4)
    batch = batch_of(policy, rollouts)
    assert len(batch.actions.token_M) == 0
    loss = policy.method.loss(policy, batch, 0.8, ObjectiveConfig())
    loss.value.backward()
    assert loss.value.isfinite() and policy.base.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    assert loss.statistics["latent/ratio_mean_token"].tolist() == [0, 0]


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


# ---- bad input ------------------------------------------------------------------------------------------------------


def checked(*words: str) -> list[str]:
    config = load_config("model.path=some/model", "data.train=x.jsonl", "method.name=latent_grpo", *words)
    return LATENT_GRPO.check(config, tiny.tokenizer())


def test_an_end_of_several_tokens_is_refused_and_named():
    with pytest.raises(UserError, match=r"thinking.end: latent_grpo ends its latents with one token, and '</think>' is \d+ here: '<'"):
        checked("thinking.end=</think>")
    assert checked("thinking.end=a", "method.is_latent_init=true") == []


def test_what_is_doubtful_is_warned_of():
    warnings = checked("thinking.end=a", "method.noise_scale=0.5")
    assert len(warnings) == 2
    assert warnings[0].startswith("method.noise_scale=0.5: the density") and "biased" in warnings[0]
    assert warnings[1].startswith("model.path=some/model: ") and "method.is_latent_init=true" in warnings[1]
    config = load_config("model.path=some/model", "data.train=x.jsonl", "method.name=soft_grpo", "thinking.end=a")
    assert SOFT_GRPO.check(config, tiny.tokenizer()) == []


@pytest.mark.parametrize(("words", "message"), [
    ("top_k=65", "method.top_k: wanted 1 to 64 tokens in a mixture, got 65"),
    ("top_k=0", "method.top_k: wanted 1 to 64 tokens in a mixture, got 0"),
    ("top_p=0.0", "method.top_p: wanted more than 0"),
    ("noise_low=4.0", "method.noise_low, method.noise_high: wanted low <= high"),
    ("noise_scale=-1.0", "method.noise_scale: wanted 0 or more"),
    ("delta=-0.1", "method.delta: wanted 0 or more"),
    ("mixture_temperature=0.0", "method.mixture_temperature: wanted more than 0"),
    ("candidates=all", "method.candidates: 'all' is not one of union, renormalised"),
    ("end_rule=never", "method.end_rule: 'never' is not one of likeliest, contest"),
    ("truncated=cut", "method.truncated: 'cut' is not one of excluded, masked, kept")])
def test_options_out_of_range_are_one_sentence(words, message):
    with pytest.raises(UserError) as error:
        load_config("data.train=x.jsonl", "method.name=latent_grpo", f"method.{words}")
    assert str(error.value).startswith(message)


def test_more_tokens_than_there_are_is_refused():
    config = load_config("data.train=x.jsonl", "method.name=latent_grpo", "thinking.end=a", "method.top_k=20")
    few = type("Few", (), {"encode": lambda self, text, add_special_tokens: [1], "__len__": lambda self: 12})()
    with pytest.raises(UserError, match="method.top_k: a mixture of 20 tokens is more than the vocabulary's 12"):
        LATENT_GRPO.check(config, few)


def test_the_preset_is_what_was_published():
    config = SOFT_GRPO.Config()
    assert (config.top_k, config.top_p, config.mixture_temperature, config.noise_low, config.noise_high) == (5, 0.95, 0.1, -1.5, 3.0)
    assert config.candidates == "renormalised" and not config.one_sided and config.clamp_density
    assert config.logprob_floor == -3.0 and config.noise_scale == 1.0
    assert replace(config, name="x") != config
