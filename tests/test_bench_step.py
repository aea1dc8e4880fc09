"""A whole training step beside the released loop's: the re-created one learns what ours learns from the same completions, its
latents end in its text, and both sides of the benchmark do the same work."""

import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch

from benches import latent_loop, results, setting, step, trl_update
from benches.released_step import ReleasedStep
from fastlatent import build
from fastlatent.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("model")))


@pytest.fixture
def sides(model, tmp_path):
    """Ours and the released one's, exact enough to compare, with gates that let much of a latent through."""
    config = setting.config("latent", model, "model.dtype=float32", "method.r_min=0.5", "method.r_max=0.6")
    tokenizer, reward = tiny.tokenizer(), partial(step.half_rewarded, config=config)
    requests = tiny.requests(setting.prompts(config, tokenizer, 2), 8)
    assert len({len(r.prompt.token_ids) for r in requests}) == 2  # one is padded
    return step.OurStep(config, tokenizer, reward), ReleasedStep(config, tokenizer, len(requests), tmp_path, reward), requests


def test_both_sides_learn_the_same_from_the_same_completions(sides):
    ours, released, requests = sides
    groups, drawn = released.draw(requests, 0)
    gradients: list[dict] = []

    def keep(named):
        return lambda *_: gradients.append({name: p.grad.clone() for name, p in named.items()})

    ours.update.optimizer.step = keep({name: p for name, p in ours.policy.trainable().items()})
    released.update.optimizer.step = keep(dict(released.update.model.named_parameters()))
    norms = ours.update(groups).grad_norm, released.learn(groups, drawn)
    assert float(norms[0]) == pytest.approx(float(norms[1]), rel=1e-5)
    mine = {name if name.startswith("method.") else name.removeprefix("model."): g for name, g in gradients[0].items()}
    assert mine.keys() == gradients[1].keys() and any(name.startswith("method.") for name in mine)
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("plant", ["dropped", "shifted"])
def test_latents_that_are_laid_wrongly_show_in_the_gradient(sides, plant):
    ours, released, requests = sides
    groups, drawn = released.draw(requests, 0)
    wrong = (replace(drawn, latent_BC=torch.zeros_like(drawn.latent_BC)) if plant == "dropped"
             else replace(drawn, mixture_BCD=drawn.mixture_BCD.roll(1, 1)))
    with pytest.raises(RuntimeError, match="the two updates differ"):
        step.check_same(ours.update(groups).grad_norm, released.learn(groups, wrong), torch.float32)


def test_the_released_loop_draws_with_the_newest_weights(sides):
    _, released, requests = sides
    before = {name: p.clone() for name, p in released.update.model.named_parameters()}
    released(requests, 0)
    released.draw(requests, 1)
    trained = dict(released.update.model.named_parameters())
    loop = dict(released.loop.model.named_parameters()) | {f"method.{n}": p for n, p in released.loop.method.named_parameters()}
    assert loop.keys() == trained.keys()
    assert all(torch.equal(p, trained[name]) for name, p in loop.items())
    assert not any(torch.equal(p, before[name]) for name, p in loop.items())


def test_latents_of_the_loop_end_where_its_text_has_the_delimiter(model, monkeypatch):
    config, tokenizer = setting.config("latent", model), tiny.tokenizer()
    loop = latent_loop.LatentLoop(config, tokenizer)
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in ("#", "##", "a", "b")}
    rows = [["a", "##", "#", "#", "b"], ["a", "##", "a", "##", "b"], ["#", "##", "##", "a", "b"]]
    script = iter(zip(*rows))

    def scripted(logits_BV, table_VD, sampling):
        token_B = torch.tensor([ids[text] for text in next(script)])
        return token_B, torch.zeros(len(rows), table_VD.shape[1], dtype=table_VD.dtype)

    monkeypatch.setattr(latent_loop, "mix", scripted)
    drawn = loop.draw(tiny.requests(setting.prompts(config, tokenizer, 1), 3), [], 0, max_new=5)
    assert drawn.token_ids_BC.tolist() == [[ids[text] for text in row] for row in rows]
    # the token that completes it is read as it is, however the delimiter is cut; nothing is latent again
    assert drawn.latent_BC.tolist() == [[True] * 3 + [False] * 2, [True] * 5, [True] * 2 + [False] * 3]


def test_both_sides_of_a_step_draw_and_learn_from_as_many_tokens(model, tmp_path, capsys):
    out = tmp_path / "lines.jsonl"
    step.main(["--model", model, "--batch", "16", "--rounds", "1", "--out", str(out)])
    rows = {row["variant"]: row for row in results.read(out)}
    assert list(rows) == ["hf-hrpo", "released"]
    tokens = 16 * setting.config("latent", model).sampling.max_new_tokens
    for row in rows.values():
        metrics, facts = row["metrics"], row["facts"]
        assert row["case"] == "2x8 of 26 tokens" and facts["acted_tokens"] == tokens
        assert tokens / 2 < facts["latent_tokens"] <= tokens
        assert 0 < metrics["rollout_s"] < metrics["wall_s"]
    ratio = rows["released"]["metrics"]["wall_s"] / rows["hf-hrpo"]["metrics"]["wall_s"]
    assert rows["hf-hrpo"]["metrics"]["speed_over_released"] == pytest.approx(ratio, rel=1e-3)
    assert "speed_over_released" not in rows["released"]["metrics"]
    assert f"{ratio:.2f} x the released loop's speed" in capsys.readouterr().out


def test_a_step_is_measured_alone_where_there_is_no_trl(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    out = tmp_path / "lines.jsonl"
    step.main(["--model", model, "--against", "none", "--batch", "8", "--rounds", "1", "--out", str(out)])
    (row,) = results.read(out)
    assert row["variant"] == "hf-hrpo" and "trl" not in json.dumps(row["facts"])


def test_a_step_is_not_timed_beside_other_work(model, tmp_path, monkeypatch):
    padded = trl_update.padded

    def planted(*args):
        tensors = padded(*args)
        tensors["tool_mask"][:4] = 0
        return tensors

    monkeypatch.setattr(trl_update, "padded", planted)
    with pytest.raises(RuntimeError, match="the two updates differ"):
        step.main(["--model", model, "--batch", "16", "--rounds", "1", "--out", str(tmp_path / "lines.jsonl")])
    assert not (tmp_path / "lines.jsonl").exists()


@pytest.mark.parametrize(("words", "said"), [
    (["--batch", "12"], "--batch: wanted a multiple of 8, got 12"), (["--rounds", "0"], "--rounds: wanted 1 or more, got 0"),
    (["--engine", "fast"], "invalid choice: 'fast'")])
def test_bad_arguments_are_found_before_a_model_is_loaded(words, said, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "policy", lambda config: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=said):
        step.main(["--model", "/nowhere", *words, "--out", str(tmp_path / "lines.jsonl")])
