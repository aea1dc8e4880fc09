"""An update of several optimizer steps against the papers' formulas in float64: what is fixed between them, and what
divides them."""

from __future__ import annotations

import pytest
import tiny
import torch

from fastlatent.optim import Optimizer
from fastlatent.rollout.hf_engine import HFEngine
from fastlatent.schema import AnswerConfig, Config, ObjectiveConfig, OptimConfig, SamplingConfig, ThinkingConfig, UpdateConfig
from fastlatent.types import Group, Rollout, Sampling
from fastlatent.update import Updater

ENDS = (ThinkingConfig(end="####", force="\n#### ", max_tokens=12, stop=["\n"]), AnswerConfig(max_tokens=6, stop=["\n"]))
TEMPERATURE, KL, CLIP, MAX_NEW = 0.8, 0.05, 0.05, 24
ADVANTAGES = [[1.5, -0.5, -1.25, 0.25], [0.0, 0.0, 0.0, 0.0], [-1.0, 1.0, 0.5, -0.5], [2.0, -0.5, -0.5, -1.0]]
# steps large enough that ratios pass the clip, smooth enough (eps) that rounding does not decide a direction
OPTIM = OptimConfig(lr=0.3, betas=(0.9, 0.95), eps=1.0, max_grad_norm=1.0)


def in_float64(groups: list[Group], objective: ObjectiveConfig) -> dict[str, torch.Tensor]:
    """The weights after the update: a stock model, a completion at a time, torch's own AdamW."""
    model, reference = tiny.model().double(), tiny.model().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps, weight_decay=0.0)

    def logprobs(of, r: Rollout) -> torch.Tensor:
        prompt = r.request.prompt.token_ids
        logits = of(torch.tensor([[*prompt, *r.token_ids]])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        return logits.log_softmax(-1).gather(1, torch.tensor(r.target_ids)[:, None])[torch.tensor(r.acted), 0]

    dealt = [groups[part :: objective.num_minibatches] for part in range(objective.num_minibatches)]
    parts = [[(r, a) for g in part for r, a in zip(g.rollouts, g.advantage_G.tolist(), strict=True)] for part in dealt]
    with torch.no_grad():
        fixed = [[(logprobs(model, r), logprobs(reference, r)) for r, _ in part] for part in parts]
    for _ in range(objective.num_epochs):
        for part, constants in zip(parts, fixed, strict=True):
            lengths = [sum(r.acted) for r, _ in part]
            total = torch.zeros((), dtype=torch.float64)
            for (r, advantage), (old, ref), n in zip(part, constants, lengths, strict=True):
                new = logprobs(model, r)
                ratio = (new - old).exp()
                loss = -torch.minimum(ratio * advantage, ratio.clip(1 - CLIP, 1 + CLIP) * advantage)
                loss = loss + objective.kl_coef * ((ref - new).exp() - (ref - new) - 1)
                divisor = {"token_mean": sum(lengths), "sequence_mean": n * len(part), "constant": len(part) * MAX_NEW}
                total = total + loss.sum() / divisor[objective.normalizer]
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.max_grad_norm)
            optimizer.step()
    return {f"model.{name}": p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kl_coef", [0.0, KL])
@pytest.mark.parametrize("normalizer", ["token_mean", "sequence_mean", "constant"])
def test_inner_epochs_over_minibatches_move_the_weights_as_the_formulas_say(normalizer, kl_coef):
    policy = tiny.policy("grpo", has_reference=kl_coef > 0)
    requests = tiny.requests(tiny.prompts([5, 9, 4, 7]), 4)
    rollouts = tiny.engine(policy, *ENDS).generate(requests, Sampling(temperature=TEMPERATURE, max_new_tokens=MAX_NEW))
    groups = [Group(rollouts[4 * i : 4 * i + 4], torch.zeros(4), {}, torch.tensor(row)) for i, row in enumerate(ADVANTAGES)]
    objective = ObjectiveConfig(normalizer=normalizer, clip_low=CLIP, clip_high=CLIP, kl_coef=kl_coef, num_epochs=2,
                                num_minibatches=2)
    config = Config(engine=HFEngine.Config(), sampling=SamplingConfig(temperature=TEMPERATURE, max_new_tokens=MAX_NEW),
                    objective=objective, optim=OPTIM, update=UpdateConfig(tokens_per_microbatch=70))
    start = {name: p.detach().double() for name, p in policy.trainable().items()}
    wanted = in_float64(groups, objective)
    result = Updater(policy, Optimizer(policy, config), config)(groups)
    assert [len(attempt.batches) > 1 for attempt in result.attempts] == [True] * 4  # microbatches of unequal size
    assert result.sums["clip_low"] > 0 and result.sums["clip_high"] > 0 and result.grad_norm > OPTIM.max_grad_norm
    assert policy.trainable().keys() == wanted.keys()
    distance = sum(float((wanted[name] - start[name]).square().sum()) for name in wanted) ** 0.5
    error = sum(float((p.detach().double() - wanted[name]).square().sum()) for name, p in policy.trainable().items()) ** 0.5
    assert error < 1e-3 * distance
