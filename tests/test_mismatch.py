"""How engine and trainer differ and what is made of it: hand-worked numbers, a float64 gradient, planted faults, the probe."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import tiny
import torch

from fastlatent import mismatch, parity, train
from fastlatent.cli import run_command
from fastlatent.config import load_config
from fastlatent.config.validation import AT_MOST
from fastlatent.errors import UserError
from fastlatent.evaluation import EVAL_STEP
from fastlatent.log import read
from fastlatent.metrics import check, is_reproducible
from fastlatent.mismatch import effective_sample_size
from fastlatent.optim import Optimizer
from fastlatent.packing import Item, pack
from fastlatent.policy import Policy
from fastlatent.rollout.failure import EngineFailed
from fastlatent.rollout.hf_engine import HFEngine
from fastlatent.schema import AnswerConfig, Config, LoraConfig, MismatchConfig, ObjectiveConfig, SamplingConfig, ThinkingConfig
from fastlatent.trainer import Trainer
from fastlatent.types import Batch, Group, LatentActions, Prompt, Request, Rollout, Sampling
from fastlatent.update import Updater, UpdateResult

LN2 = math.log(2)
# Two completions: of four tokens, the second forced, and of two. A latent input makes the next token's position a latent one.
ACTED = [[True, False, True, True], [True, True]]
LATENT = [[False, True, False, False], [True, False]]
DELTA = [[LN2, -LN2, 0.0], [2 * LN2, LN2]]  # of the acted tokens
IS_LATENT = [False, True, False, False, True]
RATIO = [2.0, 0.5, 1.0, 4.0, 2.0]


# ---- by hand --------------------------------------------------------------------------------------------------------


def by_hand(share_prompts: bool) -> Batch:
    """Both completions in one batch, under one prompt; the engine's log-probabilities are -1, -2, ... of the acted tokens."""
    prompt = tiny.prompts([3])[0]
    rollouts = []
    for sample, (acted, latent) in enumerate(zip(ACTED, LATENT, strict=True)):
        n = len(acted)
        logprobs = [-1.0 - k if is_action else 0.0 for k, is_action in enumerate(acted)]
        rollouts.append(Rollout(
            request=Request(prompt, 0, sample), token_ids=[5] * n, target_ids=[5] * n, acted=acted, latent=latent,
            thinking=[True] * n, logprobs=logprobs, log_kept=[-0.3] * n, entropy=[1.0] * n, trace=None, finish="stop",
            forced_end=False, version=0))
    return pack([Item(r, 1.0, 0.25) for r in rollouts], torch.device("cpu"), share_prompts)


def gap_by_hand(share_prompts: bool = True, **config) -> tuple[mismatch.Gap, Batch]:
    batch = by_hand(share_prompts)
    delta_A = torch.tensor([d for row in DELTA for d in row])
    return mismatch.measure(batch, batch.behaviour_logprob_A + delta_A, MismatchConfig(**config)), batch


@pytest.mark.parametrize("share_prompts", [False, True])
def test_tokens_and_latents_are_told_apart_and_the_kept_mass_is_left_out(share_prompts):
    gap, _ = gap_by_hand(share_prompts)
    assert gap.latent_A.tolist() == IS_LATENT
    assert gap.delta_A.tolist() == pytest.approx([d for row in DELTA for d in row], abs=1e-6)
    assert gap.ratio_A.tolist() == pytest.approx(RATIO, rel=1e-6) and gap.corrected_A is None


def test_a_latent_action_counts_as_latent_whatever_was_read_before_it():
    batch = by_hand(share_prompts=True)
    batch.actions = LatentActions(torch.tensor([0, 3]), torch.tensor([1, 2, 4]), {})
    gap = mismatch.measure(batch, batch.behaviour_logprob_A, MismatchConfig())
    assert gap.latent_A.tolist() == [True, True, False, True, True]
    assert batch.latent_T.sum() == 2  # of the two inputs alone


def test_the_metrics_are_those_worked_out_by_hand():
    gap, _ = gap_by_hand(correction="token_truncate")
    found = mismatch.summary([gap])
    assert all(check(name) for name in found)
    wanted = {
        "sampling_logp_difference/mean": LN2, "sampling_logp_difference/max": 2 * LN2,
        # ratios 2, 1, 4 and, truncated at 3, 2, 1, 3
        "token/num_tokens": 3, "token/logp_difference/mean": LN2, "token/logp_difference/max": 2 * LN2,
        "token/kl": ((2 - 1 - LN2) + 0 + (4 - 1 - 2 * LN2)) / 3,
        "token/ratio_raw/p1": 1.02, "token/ratio_raw/p50": 2, "token/ratio_raw/p99": 3.96,
        "token/ratio_raw/effective_sample_size": 7**2 / (4 + 1 + 16),
        "token/ratio_corrected/p1": 1.02, "token/ratio_corrected/p50": 2, "token/ratio_corrected/p99": 2.98,
        "token/ratio_corrected/effective_sample_size": 6**2 / (4 + 1 + 9), "token/frac_corrected": 1 / 3,
        # ratios 0.5, 2
        "latent/num_tokens": 2, "latent/logp_difference/mean": LN2, "latent/logp_difference/max": LN2,
        "latent/kl": ((0.5 - 1 + LN2) + (2 - 1 - LN2)) / 2,
        "latent/ratio_raw/p1": 0.515, "latent/ratio_raw/p50": 1.25, "latent/ratio_raw/p99": 1.985,
        "latent/ratio_raw/effective_sample_size": 2.5**2 / 4.25,
        "latent/ratio_corrected/p1": 0.515, "latent/ratio_corrected/p50": 1.25, "latent/ratio_corrected/p99": 1.985,
        "latent/ratio_corrected/effective_sample_size": 2.5**2 / 4.25, "latent/frac_corrected": 0}
    assert found == pytest.approx({f"sampling/{name}": value for name, value in wanted.items()}, rel=1e-6)


def test_the_metrics_of_a_step_are_over_all_its_microbatches():
    whole, (first, _) = gap_by_hand()[0], gap_by_hand()
    halves = [mismatch.Gap(first.delta_A[part], first.latent_A[part], first.ratio_A[part], None)
              for part in (slice(2), slice(2, None))]
    assert mismatch.summary(halves) == mismatch.summary([whole])
    plain = mismatch.summary([mismatch.Gap(*(getattr(first, name)[:1] for name in ("delta_A", "latent_A", "ratio_A")), None)])
    assert {name.split("/")[1] for name in plain} == {"sampling_logp_difference", "token"}
    assert not any("corrected" in name for name in plain) and mismatch.summary([]) == {}


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize("correction, ratio_min, weights", [
    ("token_truncate", 0.0, [2, 0.5, 1, 3, 2]),
    ("token_truncate", 0.75, [2, 0.75, 1, 3, 2]),
    ("token_mask", 0.0, [2, 0.5, 1, 0, 2]),
    ("token_mask", 0.75, [2, 0, 1, 0, 2]),
    # products: 2 x 0.5 x 1 = 1 and 4 x 2 = 8
    ("sequence_truncate", 0.0, [1, 1, 1, 3, 3]),
    ("sequence_mask", 0.0, [1, 1, 1, 0, 0]),
])
def test_each_correction_gives_the_weights_worked_out_by_hand(correction, ratio_min, weights, share_prompts):
    gap, batch = gap_by_hand(share_prompts, correction=correction, ratio_min=ratio_min)
    mismatch.apply(gap, batch)
    assert batch.weight_A.tolist() == pytest.approx([0.25 * w for w in weights], rel=1e-6)


def test_without_a_correction_every_weight_stays():
    gap, batch = gap_by_hand()
    before = batch.weight_A
    mismatch.apply(gap, batch)
    assert batch.weight_A is before


def test_a_ratio_past_all_bounds_stays_finite_and_what_is_no_number_stays_visible():
    for correction in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        batch = by_hand(share_prompts=True)
        far = mismatch.measure(batch, batch.behaviour_logprob_A + 300, MismatchConfig(correction=correction))
        assert all(math.isfinite(value) for value in mismatch.summary([far]).values())
        odd = mismatch.measure(batch, batch.behaviour_logprob_A * math.nan, MismatchConfig(correction=correction))
        assert odd.corrected_A.isnan().all()


def test_equal_weights_are_worth_their_number():
    assert effective_sample_size(torch.full((7,), 0.3).double().numpy()) == pytest.approx(7)
    assert effective_sample_size(torch.tensor([1e6, 1.0, 1.0]).double().numpy()) == pytest.approx(1, abs=1e-5)
    assert effective_sample_size(torch.zeros(3).double().numpy()) == 0


# ---- an update ------------------------------------------------------------------------------------------------------

ENDS = (ThinkingConfig(end="####", force="\n#### ", max_tokens=12, stop=["\n"]), AnswerConfig(max_tokens=6, stop=["\n"]))
TEMPERATURE = 0.8
RATIO_MIN, RATIO_MAX = 0.75, 1.25  # a stale engine's ratios pass them on both sides


def drawn(policy: Policy, engine: HFEngine, num_prompts: int = 2) -> list[Group]:
    requests = tiny.requests(tiny.prompts([5, 9][:num_prompts]), 4)
    rollouts = engine.generate(requests, Sampling(temperature=TEMPERATURE, max_new_tokens=24))
    groups = []
    for start in range(0, len(rollouts), 4):
        group = Group(rollouts[start : start + 4], torch.zeros(4), {})
        group.advantage_G = torch.tensor([1.5, -0.5, -1.25, 0.25])
        groups.append(group)
    return groups


def config(correction: str = "none", **objective) -> Config:
    return Config(engine=HFEngine.Config(), sampling=SamplingConfig(temperature=TEMPERATURE, max_new_tokens=24),
                  objective=ObjectiveConfig(**objective), mismatch=MismatchConfig(
                      correction=correction, ratio_max=RATIO_MAX, ratio_min=RATIO_MIN))


def stale(policy: Policy, factor: float = 1.3) -> None:
    """Move one of the trainer's weights on, past what the engine has."""
    policy.base.model.layers[0].mlp.up_proj.weight.data.mul_(factor)


def updated(policy: Policy, groups: list[Group], config_: Config) -> tuple[UpdateResult, dict[str, torch.Tensor]]:
    """The result of an update, and the gradient of its first optimizer step."""
    gradients: list[dict] = []

    def commit() -> None:
        gradients.append({name: p.grad.clone() for name, p in policy.trainable().items() if p.grad is not None})

    config_.optim.max_grad_norm = 0.0
    return Updater(policy, Optimizer(policy, config_), config_)(groups, commit), gradients[0]


def gradient_in_float64(policy: Policy, groups: list[Group], correction: str, kl_coef: float) -> tuple[dict, list[float]]:
    """Each completion by itself through a stock transformers model in float64: the published formulas and autograd.
    Comes with the weights it used."""
    current, reference = tiny.model().double(), tiny.model().double()
    current.load_state_dict({name: tensor.double() for name, tensor in policy.base.state_dict().items()})
    rollouts = [(r, a) for g in groups for r, a in zip(g.rollouts, g.advantage_G.tolist(), strict=True)]
    num_tokens = sum(sum(r.acted) for r, _ in rollouts)
    total, weights = torch.zeros((), dtype=torch.float64), []
    for rollout, advantage in rollouts:
        prompt, acted = rollout.request.prompt.token_ids, torch.tensor(rollout.acted)

        def logprobs(model, rollout=rollout, prompt=prompt, acted=acted):
            logits = model(torch.tensor([[*prompt, *rollout.token_ids]])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
            return logits.log_softmax(-1).gather(1, torch.tensor(rollout.target_ids)[:, None])[:, 0][acted]

        new = logprobs(current)
        log_ratio = new.detach() - torch.tensor(rollout.logprobs, dtype=torch.float64)[acted]
        ratio = (log_ratio.sum().expand_as(log_ratio) if correction.startswith("sequence") else log_ratio).exp()
        weight = (ratio.clip(RATIO_MIN, RATIO_MAX) if "truncate" in correction
                  else ratio * ((ratio >= RATIO_MIN) & (ratio <= RATIO_MAX)))
        to_reference = (logprobs(reference) - new) if kl_coef else torch.zeros_like(new)
        loss = -(new - new.detach()).exp() * advantage + kl_coef * (to_reference.exp() - to_reference - 1)
        total = total + (weight * loss).sum() / num_tokens
        weights += weight.tolist()
    total.backward()
    return {f"model.{name}": p.grad for name, p in current.named_parameters()}, weights


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("correction", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_the_gradient_of_a_corrected_update_is_that_of_the_formula(correction, kl_coef):
    policy = tiny.policy("grpo", has_reference=kl_coef > 0)
    groups = drawn(policy, tiny.engine(policy, *ENDS))
    stale(policy)
    wanted, weights = gradient_in_float64(policy, groups, correction, kl_coef)
    bounds = {0.0} if "mask" in correction else {RATIO_MIN, RATIO_MAX}  # they bind, and not everywhere
    assert bounds <= set(weights) and any(RATIO_MIN < w < RATIO_MAX for w in weights)
    result, gradient = updated(policy, groups, config(correction, kl_coef=kl_coef))
    assert gradient.keys() == wanted.keys()
    for name, grad in gradient.items():
        assert torch.allclose(grad.double(), wanted[name], rtol=2e-3, atol=2e-3 * float(wanted[name].abs().max())), name
    applied = torch.cat([gap.corrected_A for gap in result.gaps]).double().sort().values
    assert torch.allclose(applied, torch.tensor(weights, dtype=torch.float64).sort().values, atol=2e-3)


@pytest.mark.parametrize("method", ["grpo", "hrpo"])
def test_a_stale_engine_shows_in_tokens_and_latents(method):
    policy = tiny.policy(method)
    engine = tiny.engine(policy, *ENDS)
    fresh = mismatch.summary(updated(policy, drawn(policy, engine), config())[0].gaps)
    engine.load_weights(policy.published(), 0)
    stale(policy)
    old = mismatch.summary(updated(policy, drawn(policy, engine), config())[0].gaps)
    kinds = ("token", "latent") if method == "hrpo" else ("token",)
    assert {name.split("/")[1] for name in old} == {"sampling_logp_difference", *kinds}
    for kind in kinds:
        prefix = f"sampling/{kind}/"
        assert fresh[f"{prefix}logp_difference/max"] < 2e-4 < 0.03 < old[f"{prefix}logp_difference/mean"]
        assert fresh[f"{prefix}kl"] < 1e-6 < 1e-3 < old[f"{prefix}kl"]
        share = {name: found[f"{prefix}ratio_raw/effective_sample_size"] / found[f"{prefix}num_tokens"]
                 for name, found in (("fresh", fresh), ("old", old))}
        assert share["fresh"] == pytest.approx(1, abs=1e-6) and share["old"] < 0.99


def test_lost_latents_show_where_they_were_read():
    policy = tiny.policy("hrpo")
    groups = drawn(policy, tiny.engine(policy, *ENDS))
    for group in groups:
        for rollout in group.rollouts:
            rollout.trace.record = {name: torch.zeros_like(column) for name, column in rollout.trace.record.items()}
    found = mismatch.summary(updated(policy, groups, config())[0].gaps)
    assert found["sampling/latent/logp_difference/mean"] > 0.03


@pytest.mark.parametrize("objective, correction, num_passes", [
    ({}, "none", 0),  # the update's own log-probabilities do
    ({}, "token_truncate", 1),
    ({"num_epochs": 2}, "none", 1),  # so do the old ones
    ({"num_epochs": 2}, "token_truncate", 1),
    ({"num_minibatches": 2}, "none", 1),
    ({"score_temperature": 1.0}, "sequence_mask", 1),
    ({"score_temperature": 1.0, "num_epochs": 2}, "token_mask", 2),
])
def test_the_mismatch_is_of_every_token_and_costs_no_pass_that_is_not_needed(objective, correction, num_passes):
    policy = tiny.policy("hrpo")
    groups = drawn(policy, tiny.engine(policy, *ENDS))
    score, calls = policy.method.score, []
    policy.method.score = lambda *args: calls.append(args) or score(*args)
    result, _ = updated(policy, groups, config(correction, **objective))
    found = mismatch.summary(result.gaps)
    num_tokens = sum(sum(r.acted) for g in groups for r in g.rollouts)
    assert found["sampling/token/num_tokens"] + found["sampling/latent/num_tokens"] == num_tokens
    assert found["sampling/sampling_logp_difference/max"] < 2e-4
    assert len(calls) == num_passes * objective.get("num_minibatches", 1)


def test_at_another_temperature_our_own_engine_is_not_scored_again():
    policy = tiny.policy("grpo")
    groups = drawn(policy, tiny.engine(policy, *ENDS))
    assert updated(policy, groups, config(score_temperature=1.0))[0].gaps == []


@pytest.mark.parametrize("objective, correction", [({"num_epochs": 2}, "none"), ({}, "token_mask")])
def test_dropout_of_adapters_is_no_mismatch(objective, correction):
    """What was drawn without dropout is scored without: old log-probabilities and importance weights are the engine's own."""
    policy = tiny.policy("grpo", lora=LoraConfig(r=4, dropout=0.5))
    for name, parameter in policy.trainable().items():
        if "lora_B" in name:  # 0 at first, and A's dropout would not show
            torch.nn.init.normal_(parameter, std=0.3)
    groups = drawn(policy, tiny.engine(policy, *ENDS))
    policy.model.train()
    result, _ = updated(policy, groups, config(correction, **objective))
    assert mismatch.summary(result.gaps)["sampling/sampling_logp_difference/max"] < 2e-4
    assert policy.model.training  # learning goes on with dropout


# ---- runs -----------------------------------------------------------------------------------------------------------

WORDS = [
    "hrpo_quickstart", "model.path=model", "model.dtype=float32", "data.name=jsonl", "data.train=rows.jsonl",
    "data.held_out_size=4", "num_prompts=2", "group_size=4", "sampling.max_new_tokens=16", "thinking.max_tokens=8",
    "answer.max_tokens=3", "optim.lr=1e-3", "eval.num_prompts=3", "eval.every=3", "eval.ablations=false", "log.samples=99",
    "log.live=quiet", "num_steps=3", "rewards=[{name: checksum.checksum}]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.working_folder(tmp_path_factory.mktemp("mismatch"), num_rows=12)


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    """Train in the folder; the run's folder is `tmp_path / name`."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr("fastlatent.trainer.write_report", lambda run: None)

    def run_(name: str, *more: str):
        trainer = Trainer(load_config(*WORDS, f"out={tmp_path / name}", *more))
        trainer.run()
        return trainer

    return run_


def outcome(trainer: Trainer) -> tuple[list[dict], dict[str, torch.Tensor]]:
    rows = read(trainer.run_folder.path / "metrics.jsonl")
    return ([{name: value for name, value in row.items() if is_reproducible(name)} for row in rows],
            {name: p.detach().clone() for name, p in trainer.policy.trainable().items()})


def assert_same(ours, theirs) -> None:
    assert ours[0] == theirs[0]
    assert all(torch.equal(tensor, theirs[1][name]) for name, tensor in ours[1].items())


def steps(trainer: Trainer) -> list[dict]:
    return [row for row in read(trainer.run_folder.path / "metrics.jsonl") if "reward" in row]


def test_the_probe_prints_a_line_and_leaves_the_run_as_it_is(run, capsys):
    probed = run("probed")
    (line,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith("parity")]
    assert line.startswith("parity of engine 'hf' and trainer: |log-probability difference| mean ")
    assert " read from latents)" in line and " (0 read" not in line
    adapters = ["model.lora={r: 4, alpha: 8, dropout: 0.1}"]
    assert_same(outcome(probed), outcome(run("plain", "mismatch.probe_tokens=0")))
    assert not any(text.startswith("parity") for text in capsys.readouterr().out.splitlines())
    assert_same(outcome(run("dropout", *adapters)), outcome(run("dropout-plain", *adapters, "mismatch.probe_tokens=0")))


def test_the_probe_draws_the_tokens_it_is_asked_for_and_no_more_than_a_round_too_many():
    policy = tiny.policy("hrpo")
    for wanted in (1, 64, 200):
        asked = Config(engine=HFEngine.Config(), sampling=SamplingConfig(temperature=TEMPERATURE, max_new_tokens=24),
                       mismatch=MismatchConfig(probe_tokens=wanted))
        found = parity.probe(asked, policy, tiny.engine(policy, *ENDS), tiny.prompts([5, 9, 4]))
        assert wanted <= found.num_tokens < wanted + parity.COMPLETIONS * parity.LENGTH
        assert 0 < found.num_latent < found.num_tokens and found.max < 2e-4
        found.check()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", ["weights", "gate"])
def test_the_probe_refuses_a_stale_engine_and_no_other(dtype, fault):
    policy = tiny.policy("hrpo", dtype=dtype)
    engine, asked = tiny.engine(policy, *ENDS), config()
    prompts: list[Prompt] = tiny.prompts([5, 9, 4])
    parity.probe(asked, policy, engine, prompts).check()
    if fault == "weights":
        stale(policy)
    else:
        policy.method.gate_lambda.data.sub_(2.0)
    with pytest.raises(UserError, match=f"parity of engine 'hf'.*; {dtype} wants a .*mismatch.probe_tokens=0 trains all"):
        parity.probe(asked, policy, engine, prompts).check()


def test_the_probe_draws_noise_no_step_draws_and_knows_no_dropout():
    assert AT_MOST["num_steps"] - 1 < parity.PROBE_STEP < EVAL_STEP  # steps count from 0
    policy = tiny.policy("grpo", lora=LoraConfig(r=4, dropout=0.5))
    for name, parameter in policy.model.named_parameters():
        if ".lora_B." in name:  # 0 at first: an adapter that does nothing drops nothing
            torch.nn.init.normal_(parameter.data, std=0.05)
    policy.model.train()
    engine, steps_ = tiny.engine(policy, *ENDS), []
    generate = engine.generate
    engine.generate = lambda requests, sampling: steps_.extend(r.step for r in requests) or generate(requests, sampling)
    before = torch.get_rng_state()
    found = parity.probe(config(), policy, engine, tiny.prompts([5, 9]))
    assert found.max < 2e-4 and set(steps_) == {parity.PROBE_STEP}
    assert torch.equal(before, torch.get_rng_state()) and policy.model.training


def test_what_is_no_number_is_refused_too():
    with pytest.raises(UserError, match="mean nan"):
        parity.Parity("hf", torch.bfloat16, 64, 3, math.nan, math.nan).check()


def test_a_run_with_a_stale_engine_ends_in_one_sentence_before_it_learns(run, monkeypatch, capsys, tmp_path):
    published = Policy.published

    def with_a_stale_layer(self):
        for name, tensor in published(self):
            yield name, tensor * 1.1 if name == "model.layers.0.mlp.up_proj.weight" else tensor

    monkeypatch.setattr(Policy, "published", with_a_stale_layer)
    with pytest.raises(SystemExit) as exit_:
        run_command(train.main, [*WORDS, f"out={tmp_path / 'stale'}"])
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and err.startswith("error: parity of engine 'hf'") and err.count("\n") == 1
    assert read(tmp_path / "stale" / "metrics.jsonl") == []


def test_a_corrected_run_logs_both_ratios_and_learns_as_without_where_nothing_disagrees(run):
    plain, corrected = run("plain"), run("corrected", "mismatch.correction=sequence_truncate")
    for row, other in zip(steps(plain), steps(corrected), strict=True):
        assert "time/score_old" not in row and "time/score_old" in other
        assert "sampling/latent/ratio_corrected/p50" not in row
        assert other["sampling/latent/ratio_corrected/p50"] == pytest.approx(1, abs=1e-3)
        assert other["sampling/token/frac_corrected"] == other["sampling/latent/frac_corrected"] == 0
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2)


@pytest.mark.parametrize("words, sentence", [
    (["mismatch.correction=token_trunkate"], "did you mean 'token_truncate'?"),
    (["mismatch.ratio_max=0.5"], "mismatch.ratio_max: wanted at least 1, got 0.5"),
    (["mismatch.ratio_min=2"], "mismatch.ratio_min: wanted at most 1, got 2"),
    (["mismatch.probe_tokens=-1"], "mismatch.probe_tokens: wanted at least 0, got -1"),
])
def test_a_wrong_option_is_one_sentence(words, sentence):
    with pytest.raises(UserError) as error:
        load_config("hrpo_quickstart", *words)
    assert sentence in str(error.value)


# ---- an engine that fails -------------------------------------------------------------------------------------------


def fail_at(monkeypatch, call: int) -> None:
    """The call-th generate of a run raises half way through."""
    original, calls = HFEngine._generate, []

    def failing(self, requests, sampling):
        calls.append(len(requests))
        if len(calls) == call:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")
        return original(self, requests, sampling)

    monkeypatch.setattr(HFEngine, "_generate", failing)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """An undisturbed run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.setattr("fastlatent.trainer.write_report", lambda run: None)
        trainer = Trainer(load_config(*WORDS, f"out={tmp_path_factory.mktemp('whole') / 'run'}", "mismatch.probe_tokens=0"))
        trainer.run()
        return outcome(trainer)


# without a probe: an evaluation, three steps, an evaluation
@pytest.mark.parametrize("call, saved_at", [(1, 0), (2, 0), (4, 2), (5, 3)])
def test_a_failing_engine_leaves_the_last_whole_step_and_one_sentence(
        run, whole, monkeypatch, capsys, tmp_path, call, saved_at):
    out, words = tmp_path / "failing", [*WORDS, f"out={tmp_path / 'failing'}", "mismatch.probe_tokens=0"]
    with monkeypatch.context() as patch:
        fail_at(patch, call)
        with pytest.raises(SystemExit, match="^1$"):
            run_command(train.main, words)
    err = capsys.readouterr().err
    assert err.startswith("error: the engine failed while drawing ") and err.count("\n") == 1
    assert "RuntimeError: CUDA error: an illegal memory access was encountered; " in err
    assert f"saved step {saved_at} in {out}" in err
    assert "TORCH_USE_CUDA_DSA" in (out / "engine-failure.txt").read_text()
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{saved_at:06d}"]
    assert_same(outcome(run("failing", "mismatch.probe_tokens=0", "resume=auto")), whole)


@pytest.mark.parametrize("doing, saved_at", [("taking the weights of step 1", 1), ("taking its memory again", 2)])
def test_an_engine_that_fails_between_two_draws_leaves_the_last_whole_step(
        run, whole, monkeypatch, capsys, tmp_path, doing, saved_at):
    load, calls, out = HFEngine.load_weights, [], tmp_path / "failing"

    def failing_load(self, tensors, version):
        if doing.startswith("taking the weights") and version == 1:
            raise RuntimeError("CUDA error: out of memory")
        load(self, tensors, version)

    @contextmanager
    def failing_released(self):
        yield
        calls.append(0)
        if doing.startswith("taking its memory") and len(calls) == 2:
            raise RuntimeError("CUDA error: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(HFEngine, "load_weights", failing_load)
        patch.setattr(HFEngine, "released", failing_released)
        with pytest.raises(SystemExit, match="^1$"):
            run_command(train.main, [*WORDS, f"out={out}", "mismatch.probe_tokens=0"])
    err = capsys.readouterr().err
    assert err.startswith(f"error: the engine failed while {doing}: RuntimeError: CUDA error: out of memory; ")
    assert err.count("\n") == 1
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{saved_at:06d}"]
    resumed = outcome(run("failing", "mismatch.probe_tokens=0", "resume=auto"))[1]
    assert all(torch.equal(tensor, whole[1][name]) for name, tensor in resumed.items())


def test_a_failure_keeps_its_cause_for_whoever_trains_from_python(run, monkeypatch):
    fail_at(monkeypatch, 3)
    with pytest.raises(EngineFailed) as error:
        run("python")
    assert isinstance(error.value.__cause__.__cause__, RuntimeError)
