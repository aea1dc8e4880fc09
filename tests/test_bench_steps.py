"""What a decode step is said to cost, against loops whose operators are counted by hand."""

from __future__ import annotations

from types import FunctionType

import pytest
import tiny
import torch

from benches import results, rollout, steps

CPU = torch.device("cpu")


def written_in(module: str, function):
    """The same function as if it were written in `module`."""
    return FunctionType(function.__code__, globals() | {"__name__": module}, function.__name__, function.__defaults__,
                        function.__closure__)


def test_a_step_is_what_one_more_token_adds():
    own = written_in("fastlatent.rollout.fake", lambda x: x + 1 > 0)  # two operators
    theirs = written_in("vllm.fake", lambda x: x.sum().item())  # two, of which one waits

    def drawing(length):
        def draw(number):
            for _ in range(40):  # prompts, however many
                torch.zeros(3)
            x = torch.ones(3)
            for _ in range(length):
                x[own(x)]  # one, which waits: the benchmark's
                theirs(x)
            return 3 * length

        return draw

    found = steps.per_step(drawing, CPU)
    assert (found.operators, found.own_operators, found.syncs, found.own_syncs) == (5, 2, 2, 0)
    assert found.launches is None and found.waits is None
    assert found.facts() == {"operators_per_step": 5, "own_operators_per_step": 2, "syncs_per_step": 2, "own_syncs_per_step": 0}


@pytest.mark.parametrize("wait", [
    lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x.nonzero(), lambda x: x[x > 0],
    lambda x: x.masked_select(x > 0),
    lambda x: x.index_put_((x > 0,), torch.zeros(()))])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])  # vLLM draws in the latter
def test_whoever_waits_is_named(wait, mode):
    for module, is_own in (("fastlatent_kernels.fake", True), ("transformers.fake", False)):
        with mode(), steps.Operators() as operators:
            written_in(module, wait)(torch.ones(3))
        assert operators.counted.syncs == 1
        assert len(operators.own_syncs_seen) == operators.counted.own_syncs == is_own


@pytest.mark.parametrize("work", [lambda x: x[torch.tensor([0, 2])], lambda x: torch.where(x > 0, x, 0), lambda x: x.tolist()])
def test_what_stays_on_the_device_is_no_wait(work):
    with steps.Operators() as operators:
        work(torch.ones(3))
    assert operators.counted.syncs == 0


def test_every_line_of_the_rollout_says_what_a_step_costs(tmp_path, capsys):
    out, model = tmp_path / "lines.jsonl", str(tiny.save(tmp_path / "model"))
    rollout.main(["--model", model, "--batch", "2", "--rounds", "1", "--ends", "stops", "--engine", "hf,loop,generate",
                  "--mode", "discrete,hrpo_full,hrpo_topk", "--out", str(out)])
    facts = {row["variant"]: row["facts"] for row in results.read(out)}
    assert set(facts) == {"hf-discrete", "hf-hrpo_full", "hf-hrpo_topk", "loop-hrpo_full", "loop-hrpo_topk", "generate"}
    assert all(f["operators_per_step"] > 20 and f["own_syncs_per_step"] == 0 for f in facts.values())
    assert facts["hf-discrete"]["syncs_per_step"] == 0
    assert facts["hf-hrpo_full"]["own_operators_per_step"] > facts["hf-discrete"]["own_operators_per_step"]
    assert facts["generate"]["own_operators_per_step"] == 0 < facts["generate"]["syncs_per_step"]
    assert facts["loop-hrpo_full"]["syncs_per_step"] >= 1  # it asks whether all rows are done
    assert f"a step: {facts['generate']['operators_per_step']:.1f} operators, own 0.0; " in capsys.readouterr().out


def test_a_driver_that_reports_no_launch_is_not_taken_at_its_word():
    assert steps._driver_calls(lambda: torch.ones(3) + 1) == (None, None)


def test_a_side_whose_step_cannot_be_counted_is_timed_all_the_same(tmp_path, monkeypatch, capsys):
    """And is told of; the other sides are counted."""
    out, stock = tmp_path / "lines.jsonl", rollout.per_step

    def per_step(drawing, device):
        if isinstance(drawing.func.__self__, rollout.Plain):
            raise RuntimeError("not while I am watched")
        return stock(drawing, device)

    monkeypatch.setattr(rollout, "per_step", per_step)
    rollout.main(["--model", str(tiny.save(tmp_path / "model")), "--batch", "2", "--rounds", "1", "--ends", "stops,equal",
                  "--engine", "hf,generate", "--mode", "discrete", "--out", str(out)])
    rows = results.read(out)
    assert len(rows) == 4 and all(row["metrics"]["rate_tok_s"] > 0 for row in rows)
    assert {row["variant"] for row in rows if "operators_per_step" in row["facts"]} == {"hf-discrete"}
    assert "generate: what a step costs was not counted: not while I am watched" in capsys.readouterr().err
