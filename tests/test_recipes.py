"""Every recipe takes two steps on a tiny random model, with all it turns on; and what the options of an update do."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest
import tiny
import torch

from fastlatent import checkpoint
from fastlatent.build import sampling_of
from fastlatent.config import load_config
from fastlatent.config.layers import recipes
from fastlatent.log import read
from fastlatent.trainer import Trainer

# rewards of the user's own: a random model never answers right, and what earns nothing teaches nothing
REWARDS = '''
def checksum(completion):
    return float(sum(map(ord, completion)) % 5)

def parity(completion):
    return float(len(completion) % 2)

def constant(completion):
    return 1.0

def failing(completion):
    raise RuntimeError("out of words")

def hard(completion, answer, difficulty, **columns):
    return difficulty * float(answer in completion)
'''
SMALL = ["num_steps=2", "sampling.max_new_tokens=24", "eval.num_prompts=4", "log.live=quiet", "log.samples=99",
         "model.path=model"]
QUICK = ["grpo_quickstart", *SMALL, "model.dtype=float32", "sampling.max_new_tokens=32", "num_prompts=4", "group_size=4",
         "eval.every=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes")
    tiny.save(path / "model")
    (path / "my_rewards.py").write_text(REWARDS)
    questions = [f"Tom has {n} apples and buys 30 more." for n in range(16)]
    gsm8k = [{"question": q, "answer": f"{n} + 30 = {n + 30}\n#### {n + 30}"} for n, q in enumerate(questions)]
    math = [{"problem": q, "answer": f"\\frac{{{n}}}{{7}}", "difficulty": n} for n, q in enumerate(questions)]
    for name, rows in (("gsm8k", gsm8k), ("math", math)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def inside(folder, tmp_path, monkeypatch):
    """In the folder, with runs going elsewhere."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr("fastlatent.trainer.write_report", lambda run: None)
    return tmp_path


def train(out: Path, *words: str) -> Trainer:
    """The trainer of a finished run."""
    trainer = Trainer(load_config(*words, f"out={out}"))
    trainer.start = {name: p.detach().clone() for name, p in trainer.policy.trainable().items()}
    trainer.run()
    return trainer


def steps(trainer: Trainer) -> list[dict]:
    return [row for row in read(trainer.run_folder.path / "metrics.jsonl") if "num_tokens" in row]


def moved(trainer: Trainer) -> set[str]:
    """Names of the parameters that the run has changed."""
    return {name for name, p in trainer.policy.trainable().items() if not torch.equal(p, trainer.start[name])}


def groups(trainer: Trainer) -> dict[tuple, list[float]]:
    """Rewards by step and prompt of everything that was learnt from."""
    out = defaultdict(list)
    for row in read(trainer.run_folder.path / "samples.jsonl"):
        out[row["step"], row["prompt_id"]].append(row["reward"])
    return out


# ---- recipes --------------------------------------------------------------------------------------------------------

GSM8K = ["data.train=gsm8k.jsonl", "rewards=[{name: exact_number, strict: false}, {name: my_rewards.checksum}]"]
OWN = {
    "hrpo_gsm8k": GSM8K,
    "grpo_gsm8k": GSM8K,
    "hrpo_math": ["data.train=math.jsonl", "rewards=[{name: math_equal}, {name: my_rewards.checksum}]"],
    "hrpo_quickstart": ["rewards=[{name: exact_number, strict: true}, {name: my_rewards.checksum}]"],
    "grpo_quickstart": ["rewards=[{name: exact_number, strict: true}, {name: my_rewards.checksum}]"],
}
MATH = ["data.train=math.jsonl", "rewards=[{name: math_equal, require_delimiter: false}, {name: my_rewards.checksum}]",
        "num_prompts=4", "group_size=4", "thinking.end=e",  # published ends are not one token of the tiny tokenizer
        "answer.stop=[a, e, i, o, t, n, s]"]  # else every completion is cut
MIXTURES = {"latent_grpo_gsm8k": [*MATH, "data.question=problem"], "soft_grpo_math": MATH,
            "latent_grpo_quickstart": [*MATH, "data.name=jsonl", "data.question=problem", "sampling.max_new_tokens=64",
                                       "num_prompts=8"]}  # fewer or shorter ones may all be cut
IMITATES = {"latent_sft_quickstart"}  # for fastlatent.sft, whose tests try it


def test_every_recipe_is_tried_here():
    assert set(OWN) | set(MIXTURES) | IMITATES == set(recipes())


@pytest.mark.parametrize("recipe", OWN)
def test_a_recipe_takes_two_steps(inside, recipe):
    # a published warm-up would be the first of two steps, at a rate of 0
    own = ["sampling.max_new_tokens=32"] if "quickstart" in recipe else ["optim.warmup_ratio=0"]
    trainer = train(inside / "run", recipe, *SMALL, *own, *OWN[recipe])
    config, rows = trainer.config, steps(trainer)
    assert [row["step"] for row in rows] == [1, 2] and trainer.step == 2
    assert all(row["grad_norm"] > 0 and row["guard/skipped_steps"] == 0 for row in rows)
    assert all(row["guard/reward_exceptions"] == row["guard/reward_invalid"] == 0 for row in rows)
    assert moved(trainer) == trainer.start.keys()
    assert checkpoint.load(checkpoint.latest(inside / "run")).step == 2
    has_latents = recipe.startswith("hrpo")
    for row in rows:
        assert ("latent/gate_mean" in row) == ("latent/frac_tokens" in row) == has_latents
    if "quickstart" in recipe:
        evaluated = [row["step"] for row in read(inside / "run" / "metrics.jsonl") if "eval/accuracy" in row]
        assert evaluated[0] == 0 and evaluated[1] == 2
        return
    # what the published recipes turn on: adapters, a reference, sampling among 50, updates at another temperature
    assert trainer.policy.dtype == torch.bfloat16 and trainer.policy.base.is_gradient_checkpointing
    assert {name.split(".")[-4] for name in trainer.start if "lora" in name} == set(config.model.lora.target_modules)
    assert all("time/score_ref" in row and row["kl"] >= 0 for row in rows) and rows[1]["kl"] > 0
    assert trainer.update.temperature == 1.0 and config.sampling.temperature == 0.5
    rollout = trainer.engine.generate(tiny.requests(tiny.prompts([5]), 1), sampling_of(config))[0]
    assert all(kept <= 0 for kept in rollout.log_kept) and any(kept < 0 for kept in rollout.log_kept)
    if has_latents:
        assert {name: column.shape[1] for name, column in rollout.trace.record.items()} == {"ids": 50, "weights": 50}


@pytest.mark.parametrize("recipe", MIXTURES)
def test_a_recipe_whose_actions_are_mixtures_takes_two_steps(inside, recipe, capsys):
    trainer = train(inside / "run", recipe, *SMALL, "model.dtype=float32", "eval.every=2", "eval.num_samples=2",
                    "eval.ablations=true", "data.held_out=math.jsonl", "model.path=model", *MIXTURES[recipe])
    config, rows = trainer.config, steps(trainer)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["grad_norm"] > 0 and row["guard/skipped_steps"] == 0 for row in rows)
    assert moved(trainer) == trainer.start.keys() and not any("embed" in name for name in trainer.start)
    assert trainer.optimizer.scheduler.last_epoch == 2 * config.objective.num_minibatches
    reasons = [f"latent/exit_{reason}" for reason in ("end", "forced", "cut")]
    for row in rows:
        assert sum(row[name] for name in reasons) == pytest.approx(1) and row["latent/exit_forced"] == 0
        assert 1 <= row["latent/effective_k"] <= config.method.top_k and 0 < row["latent/noise_used"] < 1
        assert row["latent/frac_tokens"] > 0.2 and row["latent/norm_ratio"] > 0
        assert 0.5 < row["latent/ratio_mean_latent"] < 2 and row["latent/clip_ratio_latent"] <= 1
        assert row["sampling/sampling_logp_difference/mean"] < 2e-4
        assert ("time/score_ref" in row) == (config.objective.kl_coef > 0)
    assert any(row["latent/frac_first_selected"] > 0 for row in rows) == config.method.select_first
    assert any(row["latent/frac_masked"] > 0 for row in rows) == (config.method.truncated == "masked")
    evaluated = [row for row in read(inside / "run" / "metrics.jsonl") if "eval/accuracy_latents_off" in row]
    assert [row["step"] for row in evaluated] == [0, 2]
    assert all(f"eval/accuracy_latents_{how}" in row for row in evaluated for how in ("on", "shuffled"))
    lines = capsys.readouterr().out.splitlines()
    for how in ("on", "off", "shuffled"):  # where it starts from, and what it has become
        assert [line.partition(" accuracy")[0].split() for line in lines if f"latents {how} " in line] == [
            ["step", "0:", "latents", how], ["latents", how]]
    assert sum(line.startswith("collapse alarms: ") for line in lines) == 1
    # a published recipe names a model that reads mixtures; the quickstart is given one, and this one does not
    assert sum(line.startswith("warning: ") for line in lines) == (recipe == "latent_grpo_quickstart")


# ---- what is learnt from --------------------------------------------------------------------------------------------


def test_groups_without_variance_are_redrawn(inside):
    words = ["group_size=2", "rewards=[{name: my_rewards.parity}]", "objective.max_filter_rounds=6"]
    plain = train(inside / "plain", *QUICK, *words)
    assert any(len(set(rewards)) == 1 for rewards in groups(plain).values())
    filtered = train(inside / "filtered", *QUICK, *words, "objective.filter_zero_variance=true")
    learnt = groups(filtered)
    assert all(len(rewards) == 2 and len(set(rewards)) == 2 for rewards in learnt.values())
    assert [sum(step == n for step, _ in learnt) for n in (1, 2)] == [4, 4]
    for row in steps(filtered):
        num_drawn = 4 + row["num_groups_filtered"]
        assert num_drawn % 4 == 0 and num_drawn > 4
        assert 0 < row["frac_reward_zero_std"] < 1


def test_a_prompt_that_comes_again_within_a_step_is_drawn_anew(inside):
    """7 rounds of 4 prompts are more than the 16 there are: with the same noise they would be the same completions."""
    trainer = Trainer(load_config(
        *QUICK, f"out={inside / 'run'}", "num_steps=1", "data.name=jsonl", "data.train=gsm8k.jsonl", "data.answer_after='####'",
        "rewards=[{name: my_rewards.constant}]", "objective.filter_zero_variance=true", "objective.max_filter_rounds=6",
        "mismatch.probe_tokens=0"))
    draw, drawn = trainer.engine.generate, defaultdict(list)

    def watched(requests, sampling):
        rollouts = draw(requests, sampling)
        for rollout in rollouts:
            drawn[rollout.request.prompt.id].append(tuple(rollout.token_ids))
        return rollouts

    trainer.engine.generate = watched
    trainer.run()
    again = [completions for completions in drawn.values() if len(completions) > 4]
    assert len(again) == 12 and all(completions[:4] != completions[4:] for completions in again)


def test_redrawing_stops_at_its_cap_and_counts(inside):
    trainer = train(inside / "run", *QUICK, "rewards=[{name: my_rewards.constant}]",
                    "objective.filter_zero_variance=true", "objective.max_filter_rounds=2")
    for row in steps(trainer):
        assert row["num_groups_filtered"] == 3 * 4 and row["frac_reward_zero_std"] == 1
        assert row["grad_norm"] == 0 and row["num_tokens"] > 0
    assert moved(trainer) == set() and groups(trainer) == {}


def test_completions_that_were_cut_can_be_left_out(inside):
    cut = ["grpo_gsm8k", *SMALL, "sampling.max_new_tokens=4", *OWN["grpo_gsm8k"]]
    learning = train(inside / "learning", *cut)
    assert moved(learning) and all(row["completions/clipped_ratio"] > 0.9 for row in steps(learning))
    words = [*cut, "objective.mask_truncated_completions=true", "answer.stop=[]"]
    masked = train(inside / "masked", *words)
    for row, other in zip(steps(masked), steps(learning), strict=True):
        if row["completions/clipped_ratio"] == 1:
            assert row["grad_norm"] == 0 < other["grad_norm"]
    assert any(row["completions/clipped_ratio"] == 1 for row in steps(masked))


# ---- how it is learnt -----------------------------------------------------------------------------------------------


def test_epochs_and_minibatches_are_optimizer_steps_against_the_weights_that_sampled(inside):
    words = [*QUICK, "rewards=[{name: my_rewards.checksum}]", "optim.lr=1e-3", "optim.schedule=linear"]
    once = train(inside / "once", *words)
    often = train(inside / "often", *words, "objective.num_epochs=3", "objective.num_minibatches=2")
    assert once.optimizer.scheduler.last_epoch == 2 and often.optimizer.scheduler.last_epoch == 2 * 3 * 2
    assert all(state["step"] == 12 for state in often.optimizer.adamw.state.values())
    for row in steps(once):  # the ratio is 1 by definition
        assert row["policy/approx_kl"] == 0 and row["policy/ratio_mean"] == 1 and "time/score_old" not in row
    for row in steps(often):
        assert row["policy/approx_kl"] > 0 and row["policy/ratio_mean"] != 1 and "time/score_old" in row
    assert steps(once)[0]["reward"] == steps(often)[0]["reward"]  # the same rollouts


def test_a_frozen_embedding_stays_as_it_is(inside):
    words = [*QUICK, "rewards=[{name: my_rewards.checksum}]", "method.name=hrpo"]
    before = tiny.model().model.embed_tokens.weight
    frozen = train(inside / "frozen", *words, "model.freeze_embedding=true")
    assert torch.equal(frozen.policy.base.get_input_embeddings().weight, before)
    assert moved(frozen) == frozen.start.keys()
    free = train(inside / "free", *words)
    assert not torch.equal(free.policy.base.get_input_embeddings().weight, before)


def test_how_an_update_is_cut_into_microbatches_changes_nothing(inside):
    words = [*QUICK, "rewards=[{name: my_rewards.checksum}]", "chat.max_prompt_tokens=100"]
    whole, pieces = (train(inside / budget, *words, f"update.tokens_per_microbatch={budget}")
                     for budget in ("4096", "132"))
    for row, other in zip(steps(whole), steps(pieces), strict=True):
        assert row["policy_loss"] == pytest.approx(other["policy_loss"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_a_reward_function_of_ones_own_gets_the_columns_of_the_data(inside):
    trainer = train(inside / "run", *QUICK, "data.name=jsonl", "data.train=math.jsonl", "data.question=problem",
                    "rewards=[{name: my_rewards.hard, weight: 2.0}, {name: my_rewards.checksum}]")
    for row in steps(trainer):
        assert row["reward"] == pytest.approx(2 * row["rewards/hard/mean"] + row["rewards/checksum/mean"])
    for row in read(inside / "run" / "samples.jsonl"):
        assert row["rewards"]["checksum"] == sum(map(ord, row["completion"])) % 5
        assert row["rewards"]["hard"] == 0 or row["answer"] in row["completion"]


def test_the_learning_rate_goes_on_past_steps_that_teach_nothing(inside):
    """Four steps without variance: linear decay from 1 to 0 all the same, and no weight moves."""
    trainer = train(inside / "flat", *QUICK, "num_steps=4", "optim.schedule=linear", "optim.lr=1.0",
                    "rewards=[{name: my_rewards.constant}]")
    assert [row["learning_rate"] for row in steps(trainer)] == pytest.approx([0.75, 0.5, 0.25, 0.0])
    assert not moved(trainer)


def test_a_failing_reward_is_told_once(inside, capsys):
    train(inside / "told", *QUICK, "rewards=[{name: my_rewards.failing}]")
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("reward missing")]
    assert len(told) == 1 and "out of words" in told[0]


def test_the_distance_of_engine_and_trainer_is_measured(inside):
    trainer = train(inside / "distance", *QUICK, "rewards=[{name: my_rewards.checksum}]")
    gaps = [row["sampling/sampling_logp_difference/mean"] for row in steps(trainer)]
    assert all(0 <= gap < 2e-4 for gap in gaps) and len(gaps) == 2
