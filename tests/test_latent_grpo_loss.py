"""The loss of Latent-GRPO and SofT-GRPO and its gradient, against the formulas in float64, one rollout at a time."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from mixtures import LATENT_GRPO, SOFT_GRPO, UNFORCED, batch_of, policy_of, rollouts_of

from fastlatent.policy import Policy
from fastlatent.schema import ModelConfig, ObjectiveConfig
from fastlatent.types import Batch, Rollout


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
    free = Policy(tiny.model(), ModelConfig(path="tiny", dtype="float32"), LATENT_GRPO, LATENT_GRPO.Config(),
                  has_reference=False)
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
    rollouts = rollouts_of(policy, ends=UNFORCED, max_new_tokens=4)
    batch = batch_of(policy, rollouts)
    assert len(batch.actions.token_M) == 0
    loss = policy.method.loss(policy, batch, 0.8, ObjectiveConfig())
    loss.value.backward()
    assert loss.value.isfinite() and policy.base.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    assert loss.statistics["latent/ratio_mean_token"].tolist() == [0, 0]
