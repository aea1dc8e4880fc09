"""A method of a user's own (`feedback`), named by its dotted path: what it reads and draws against stock transformers, what it
learns against float64, and whole runs with it."""

from __future__ import annotations

from pathlib import Path

import feedback
import pytest
import test_replay
import test_resume
import tiny
import torch
from test_replay import FORCED, FP32_TOLERANCE, LENGTHS, TEMPERATURE, draw

from fastlatent import evaluate, export, generate, parity
from fastlatent.errors import UserError
from fastlatent.methods.base import Method, ParamGroup
from fastlatent.packing import Item, pack
from fastlatent.rollout.hf_engine import HFEngine
from fastlatent.schema import AnswerConfig, Config, MismatchConfig, ObjectiveConfig, SamplingConfig, ThinkingConfig
from fastlatent.trainer import Trainer
from fastlatent.types import Rollout, Sampling

UNFORCED = (ThinkingConfig(end="####"), AnswerConfig())


# ---- what is read ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def read_again(model, rollout: Rollout) -> tuple[list[float], dict[int, torch.Tensor]]:
    """Log-probabilities of the actions, and the latent inputs by place: a stock model in float64 reads the whole text again for
    every token, and its last hidden state is its next input. Nothing of the record is used."""
    inputs, logprobs, fed = model.get_input_embeddings()(torch.tensor([rollout.request.prompt.token_ids])), [], {}
    for place, token in enumerate(rollout.token_ids):
        out = model(inputs_embeds=inputs, output_hidden_states=True)
        if rollout.acted[place]:
            logprobs.append((out.logits[0, -1] / TEMPERATURE).log_softmax(-1)[rollout.target_ids[place]].item())
        read = model.get_input_embeddings()(torch.tensor([[token]]))
        if rollout.latent[place]:
            read = fed[place] = out.hidden_states[-1][:, -1:]  # the last of them lies behind the final norm
        inputs = torch.cat([inputs, read], dim=1)
    return logprobs, fed


@pytest.mark.parametrize("ends", [FORCED, UNFORCED], ids=["forced", "unforced"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_hidden_states_are_fed_back_as_a_stock_model_would(family, ends):
    policy, stock = tiny.policy("feedback.Hidden", family=family), tiny.model(family).double()
    rollouts, blocks = draw(policy, ends, LENGTHS["unequal"]), 0
    for rollout in rollouts[::3]:
        logprobs, fed = read_again(stock, rollout)
        ours = [x for x, is_action in zip(rollout.logprobs, rollout.acted, strict=True) if is_action]
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(logprobs), atol=FP32_TOLERANCE, rtol=0)
        assert rollout.trace.position_N.tolist() == list(fed)
        fed_ND = torch.cat(list(fed.values()))[:, 0].float()
        torch.testing.assert_close(rollout.trace.record["hidden"], fed_ND, atol=1e-4, rtol=1e-4)
        assert not any(rollout.acted[place] for place in fed) and {rollout.token_ids[place] for place in fed} == {3}
        blocks += len([place for place in fed if place - 1 not in fed])
    assert blocks > len(rollouts[::3])  # some are opened on the way, by the state


def test_a_token_that_nobody_reads_ends_nothing():
    """Every token but the one that stands for a latent ends the completion, and is drawn in the block all the same."""
    policy = tiny.policy("feedback.Hidden")
    engine = tiny.engine(policy, *UNFORCED)
    engine.span.is_eos_V.fill_(True)[policy.method.config.latent_id] = False
    rollouts = engine.generate(tiny.requests(tiny.prompts([5, 9]), 2), Sampling(temperature=TEMPERATURE, max_new_tokens=32))
    assert [r.acted for r in rollouts] == [[False] * 4 + [True]] * 4 and {r.finish for r in rollouts} == {"stop"}


# ---- what is learnt -------------------------------------------------------------------------------------------------


def test_latents_as_actions_teach_what_the_formula_says():
    """Gradients of the loss in float64: -sum w A log p over tokens and latents, a latent's the density of a torch Normal."""
    policy, stock = tiny.policy("feedback.Gaussian"), tiny.model().double()
    rollouts = draw(policy, FORCED, LENGTHS["unequal"])
    advantages = [(-1) ** i * (1 + i / 7) for i in range(len(rollouts))]
    batch = pack([Item(r, a, 0.01) for r, a in zip(rollouts, advantages, strict=True)], torch.device("cpu"), share_prompts=True)
    policy.method.loss(policy, batch, TEMPERATURE, ObjectiveConfig()).value.backward()

    heads = {name: getattr(policy.method, name) for name in ("mean", "logvar")}
    exact = {name: torch.nn.Linear(64, 64).double() for name in heads}
    for name, head in heads.items():
        exact[name].load_state_dict(head.state_dict())
    total, table = torch.zeros((), dtype=torch.float64), stock.get_input_embeddings()
    for rollout, advantage in zip(rollouts, advantages, strict=True):
        prompt, trace = rollout.request.prompt.token_ids, rollout.trace
        inputs = table(torch.tensor([[*prompt, *rollout.token_ids]])).clone()
        inputs[0, len(prompt) + trace.position_N.long()] = trace.record["z"].double()
        out = stock(inputs_embeds=inputs, output_hidden_states=True)
        logprob = (out.logits[0, len(prompt) - 1 : -1] / TEMPERATURE).log_softmax(-1)
        logprob = logprob.gather(1, torch.tensor(rollout.target_ids)[:, None])[:, 0]
        before_N = out.hidden_states[-1][0, len(prompt) - 1 + trace.position_N.long()]
        normal = torch.distributions.Normal(exact["mean"](before_N), (exact["logvar"](before_N) / 2).exp())
        density_N = normal.log_prob(trace.record["z"].double()).sum(1)
        torch.testing.assert_close(trace.logprob_N.double(), density_N.detach(), atol=FP32_TOLERANCE, rtol=0)
        is_token = torch.tensor(rollout.acted) & ~torch.tensor(rollout.latent)
        total = total - 0.01 * advantage * (logprob[is_token].sum() + density_N.sum())
    total.backward()
    for name, head in heads.items():
        torch.testing.assert_close(head.weight.grad.double(), exact[name].weight.grad, atol=1e-5, rtol=1e-3)
        assert head.weight.grad.norm() > 0.1
    ours, theirs = policy.base.model.layers[0].mlp.up_proj, stock.model.layers[0].mlp.up_proj
    torch.testing.assert_close(ours.weight.grad.double(), theirs.weight.grad, atol=1e-5, rtol=1e-3)


class Forgetful(feedback.Gaussian):
    """Draws latents as actions and leaves it at that."""

    score, loss, reference_logprob = Method.score, Method.loss, Method.reference_logprob


@pytest.mark.parametrize("what", ["score", "loss", "reference_logprob"])
def test_a_method_that_does_not_say_what_its_latents_are_worth_is_told_so(what):
    policy = tiny.policy("test_own_method.Forgetful", has_reference=True)
    batch = test_replay.batches(draw(policy, FORCED, LENGTHS["unequal"]), "packed")[0]
    with pytest.raises(UserError, match="method 'feedback.Gaussian': its latents are actions, .* wanted its own score"):
        getattr(policy.method, what)(policy, batch, TEMPERATURE, *([ObjectiveConfig()] if what == "loss" else []))


# ---- the probe ------------------------------------------------------------------------------------------------------


def probed(num_latents: int, num_tokens: int) -> parity.Parity:
    policy, config = tiny.policy("feedback.Hidden"), feedback.Hidden.Config(num_latents=num_latents)
    policy.method.config = config
    asked = Config(engine=HFEngine.Config(), method=config, mismatch=MismatchConfig(probe_tokens=num_tokens),
                   sampling=SamplingConfig(temperature=TEMPERATURE, max_new_tokens=64))
    return parity.probe(asked, policy, tiny.engine(policy, *UNFORCED), tiny.prompts([5, 9, 4]))


def test_the_probe_reads_on_behind_a_long_block():
    found = probed(parity.LENGTH + 4, 64)
    assert found.num_tokens >= 64 and found.num_latent > 0 and found.max < FP32_TOLERANCE


def test_completions_without_an_action_are_refused_before_training():
    with pytest.raises(UserError, match="sampling.max_new_tokens: 64 tokens end before method 'feedback.Hidden' draws one"):
        probed(99, 8)


# ---- runs -----------------------------------------------------------------------------------------------------------

WORDS = ["model.dtype=float32", "optim.lr=1e-5", "method.num_latents=3", "eval.ablations=true", "objective.kl_coef=0.01"]
QUESTION = "Tom has 12 apples and buys 30 more."


@pytest.fixture
def inside(tmp_path, monkeypatch):
    test_resume.enter(monkeypatch, tiny.working_folder(tmp_path))


@pytest.mark.parametrize("method", feedback.NAMES)
def test_a_run_is_resumed_bit_for_bit_and_used(method, inside, monkeypatch, capsys):
    words = [*WORDS, f"method.name={method}"]
    straight = test_resume.trainer("straight", 2, *words).run()
    with monkeypatch.context() as patch:
        test_resume.signal_at(patch, Trainer, "_collect", 2, is_after=False)
        test_resume.trainer("stopped", 2, *words).run()
    assert test_resume.newest(Path("stopped")) == 1
    again = test_resume.outcome(test_resume.trainer("stopped", 2, *words).run())
    test_resume.assert_same(again, test_resume.outcome(straight))

    first = next(row for row in again["metrics"] if "reward" in row)
    assert first["latent/frac_tokens"] > 0.2 and first["grad_norm"] > 0
    assert first["sampling/latent/num_tokens"] > 0 and first["sampling/sampling_logp_difference/max"] < FP32_TOLERANCE
    assert 0 < first["kl"] < 1
    assert ("method/square" in first) == (method == "feedback.Gaussian")
    assert sum("eval/accuracy_latents_shuffled" in row for row in again["metrics"]) == 2

    capsys.readouterr()
    generate.main(["straight", QUESTION, "--samples", "2"])
    evaluate.main(["straight", "--samples", "2"])
    export.main(["straight", "exported"])
    out = capsys.readouterr().out
    assert out.count(" read as latents") == 2 and "latent    " in out and "pass@2" in out
    assert Path("exported/method.safetensors").exists() == (method == "feedback.Gaussian")


def test_a_parameter_without_a_learning_rate_is_named(inside, monkeypatch):
    monkeypatch.setattr(feedback.Gaussian, "param_groups", lambda self: [ParamGroup("mean", 1e-3, 0.0)])
    with pytest.raises(UserError, match=r"method 'feedback.Gaussian': 'logvar.weight' has no learning rate; wanted a Param"):
        test_resume.trainer("named", 2, *WORDS, "method.name=feedback.Gaussian")
