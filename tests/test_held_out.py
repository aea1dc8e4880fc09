"""Held-out questions of a run in training: when they are asked, which step was best, what taking the latents away shows."""

from __future__ import annotations

import json
from contextlib import closing

import pytest
import tiny

from fastlatent import evaluation
from fastlatent.config import load_config
from fastlatent.held_out import HeldOut
from fastlatent.log import read
from fastlatent.trainer import Trainer

WORDS = ["hrpo_quickstart", "model.path=model", "model.dtype=float32", "data.name=jsonl", "data.train=rows.jsonl",
         "data.held_out_size=4", "num_prompts=2", "group_size=2", "num_steps=7", "eval.every=3", "eval.num_samples=2",
         "sampling.max_new_tokens=16", "thinking.max_tokens=8", "answer.max_tokens=3", "rewards=[{name: parity.parity}]"]


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """In a folder with a model, twelve questions and a reward."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    tiny.save(tmp_path / "model")
    (tmp_path / "parity.py").write_text("def parity(completion):\n    return float(len(completion) % 2)\n")
    rows = [{"question": f"Tom has {n} apples.", "answer": str(n)} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("fastlatent.trainer.write_report", lambda run: None)


@pytest.fixture
def held_out(inside):
    """Of a run that has not begun, its engine holding the first weights."""
    with closing(Trainer(load_config(*WORDS))) as trainer:
        trainer._sync_weights()
        yield trainer.held_out


def test_it_is_due_every_few_steps_and_at_the_end_and_once(held_out):
    assert [step for step in range(8) if held_out.is_due(step)] == [0, 3, 6, 7]
    held_out.remember(3, 0.5)
    assert [step for step in range(8) if held_out.is_due(step)] == [0, 6, 7]


def test_the_first_of_the_best_steps_is_remembered_and_untrained_weights_are_none(held_out):
    is_best = [held_out.remember(step, accuracy) for step, accuracy in enumerate([1.0, 0.0, 0.25, 0.25, 0.125])]
    assert is_best == [False, True, True, False, False]
    assert held_out.state() == {"best_accuracy": 0.25, "best_step": 2, "evaluated_step": 4}
    other = HeldOut(held_out.config, [], held_out.policy, held_out.engine, held_out.tokenizer, held_out.pool)
    other.load(json.loads(json.dumps(held_out.state())))
    assert other.state() == held_out.state() and not other.remember(5, 0.25) and other.remember(6, 0.5)


def test_what_is_measured_is_what_the_engine_draws(held_out, monkeypatch):
    drawn, draw = [], evaluation.evaluate

    def watched(*args):
        drawn.append(draw(*args))
        return drawn[-1]

    monkeypatch.setattr(evaluation, "evaluate", watched)
    first = held_out.measure(0)
    greedy, sampled, off, shuffled = drawn
    assert [len(samples) for samples in drawn] == [4, 8, 4, 4]
    assert all(one.rollout.token_ids != other.rollout.token_ids for one, other in zip(sampled[::2], sampled[1::2], strict=True))
    parities = [[len(sample.text) % 2 for sample in samples] for samples in drawn]
    assert first.metrics["step"] == 0
    names = ("accuracy", "sampled_accuracy", "accuracy_latents_off", "accuracy_latents_shuffled")
    assert [first.metrics[f"eval/{name}"] for name in names] == [sum(p) / len(p) for p in parities]
    assert first.metrics["eval/accuracy_latents_on"] == first.metrics["eval/accuracy"]
    tokens = [[sample.rollout.token_ids for sample in samples] for samples in (greedy, off, shuffled)]
    assert tokens[0] != tokens[1] != tokens[2] != tokens[0]
    assert [line[:13] for line in first.lines] == ["step 0: held-"] + ["step 0: laten"] * 3

    # in between without ablations; in the end of what was drawn last, with the gate
    drawn.clear()
    with pytest.raises(RuntimeError, match="weights of version 0, expected 6"):
        held_out.measure(6)
    held_out.engine.load_weights(held_out.policy.published(), 6)
    assert "eval/accuracy_latents_off" not in held_out.measure(6).metrics and len(drawn) == 2
    last = held_out.ablate(6)
    assert len(drawn) == 4 and last.metrics["eval/accuracy_latents_on"] == sum(parities[0]) / 4
    assert 0.9 < last.metrics["latent/gate_mean"] < 1 and last.lines[-1].startswith("gate a: mean 0.9")
    assert held_out.engine.method.__class__.__name__ == "HRPO"


def test_held_out_answers_without_a_reward_are_told_as_such(held_out, monkeypatch):
    score = held_out.pool.score

    def broken(jobs):
        results, report = score(jobs)
        results[1].values["parity"], report.num_timeouts = None, 1
        report.errors.append("parity: took more than 5 s")
        return results, report

    assert not any("warning" in line for line in held_out.measure(0).lines)
    monkeypatch.setattr(held_out.pool, "score", broken)
    lines = held_out.measure(0).lines
    assert lines[1] == "warning: 1 of 4 have no reward parity and count as wrong (parity: took more than 5 s)"


def test_a_finished_run_that_is_opened_again_finds_the_same(inside):
    """Its engine has drawn nothing yet, and nothing is left to evaluate."""
    words = [*WORDS, "num_steps=1", "mismatch.probe_tokens=0", "log.live=quiet", "out=run"]
    first = read(Trainer(load_config(*words)).run() / "metrics.jsonl")
    again = read(Trainer(load_config(*words, "resume=auto")).run() / "metrics.jsonl")
    assert len(first) == 4 and first[-1]["step"] == 1 and "eval/accuracy_latents_shuffled" in first[-1]
    assert again == first
