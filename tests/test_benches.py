import json
import subprocess
from argparse import Namespace

import pytest
import tiny
import torch
from fastlatent_kernels import OPS

from benches import compare, learning, memory, results, rollout, setting, update
from benches.generate import num_drawn
from benches.results import Result
from benches.timing import interleave
from fastlatent import manifest
from fastlatent.errors import UserError
from fastlatent.log import MetricsLog

MACHINE = {"git": {"commit": "abc123", "dirty": False}, "hardware": {"cpu": "Some CPU", "cores": 2, "gpus": []}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("model")))


def test_rollout_measures_every_case_of_both_sides(model, tmp_path):
    out = tmp_path / "lines.jsonl"
    rollout.main(["--model", model, "--batch", "8", "--rounds", "1", "--out", str(out)])
    rows = {(row["case"], row["variant"]): row for row in results.read(out)}
    cap = setting.config("discrete", model).sampling.max_new_tokens
    cases = [f"{layout} {ends}" for layout in ("1x8", "8x1") for ends in ("stops", "equal", "recipe")]
    assert set(rows) == {(case, variant) for case in cases for variant in ("hf-discrete", "hf-hrpo_full", "generate")}
    for (case, variant), row in rows.items():
        tokens, metrics = row["facts"]["mean_tokens"], row["metrics"]
        assert metrics["rate_tok_s"] == pytest.approx(tokens / metrics["wall_s"], rel=1e-3)
        if "equal" in case:
            assert tokens == 8 * cap
        assert 0 < tokens <= 8 * cap
        if variant != "generate":
            theirs = rows[case, "generate"]["metrics"]["rate_tok_s"]
            assert metrics["speed_over_generate"] == pytest.approx(metrics["rate_tok_s"] / theirs, rel=1e-3)


def test_a_rollout_that_is_stopped_keeps_what_it_measured(model, tmp_path, monkeypatch):
    out, interleaved = tmp_path / "lines.jsonl", rollout.interleave

    def once(*args):
        monkeypatch.setattr(rollout, "interleave", stop)
        return interleaved(*args)

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(rollout, "interleave", once)
    with pytest.raises(KeyboardInterrupt):
        rollout.main(["--model", model, "--engine", "hf", "--mode", "discrete", "--batch", "4", "--rounds", "1",
                      "--out", str(out)])
    assert [row["case"] for row in results.read(out)] == ["4x1 stops"]


def test_both_sides_of_the_rollout_stop_at_the_same_ids(model):
    tokenizer, config = tiny.tokenizer(), setting.config("discrete", model)
    ids = rollout.stop_ids(config, tokenizer, "stops")
    texts = {i: tokenizer.decode([i]) for i in range(len(tokenizer))}
    assert ids == [i for i, text in texts.items() if "\n" in text or i == tokenizer.eos_token_id]
    assert len(ids) > 1
    ours, seen = rollout.OurEngine("hf", "discrete", Namespace(model=model, batches=[32], mode="discrete"), tokenizer), []
    generate = ours.engine.generate
    ours.engine.generate = lambda *args: seen.extend(generate(*args)) or seen
    requests = tiny.requests(setting.prompts(config, tokenizer, 4), 8)
    assert ours.drawing(requests, "stops")(0) == sum(len(r.token_ids) for r in seen)
    cap = config.sampling.max_new_tokens
    for r in seen:
        assert not any(token in ids for token in r.token_ids[:-1])
        assert r.token_ids[-1] in ids or len(r.token_ids) == cap
    assert {len(r.token_ids) == cap for r in seen} == {True, False}  # some stop, some reach the cap


def test_tokens_behind_a_stop_do_not_count():
    rows = torch.tensor([[5, 6, 2, 2, 2], [5, 6, 7, 8, 9], [2, 0, 0, 0, 0], [5, 3, 6, 2, 0]])
    assert num_drawn(rows, [2, 3]) == 3 + 5 + 1 + 2
    assert num_drawn(rows, []) == 20


def test_update_measures_ours_and_trls(model, tmp_path):
    out = tmp_path / "lines.jsonl"
    update.main(["--model", model, "--batch", "16", "--rounds", "1", "--out", str(out)])
    rows = {row["variant"]: row for row in results.read(out)}
    assert list(rows) == ["latent", "discrete", "trl"]
    assert all(row["metrics"]["wall_s"] > 0 for row in rows.values())
    assert rows["latent"]["facts"]["latent_tokens"] > 0
    assert rows["trl"]["facts"]["backends"]["token_logprob"] == OPS["token_logprob"].chosen(
        torch.ones(2, 4), torch.ones(8, 4), torch.zeros(2, dtype=torch.int64))
    ratio = rows["trl"]["metrics"]["wall_s"] / rows["discrete"]["metrics"]["wall_s"]
    assert rows["discrete"]["metrics"]["speed_over_trl"] == pytest.approx(ratio, rel=1e-3)
    assert "speed_over_trl" not in rows["trl"]["metrics"]


def test_update_refuses_to_compare_different_work(model, tmp_path, monkeypatch):
    from benches import trl_update

    padded = trl_update.padded

    def planted(*args):
        tensors = padded(*args)
        tensors["tool_mask"][:4] = 0  # what four of sixteen completions did is left out: more than bfloat16 rounds away
        return tensors

    monkeypatch.setattr(trl_update, "padded", planted)
    with pytest.raises(RuntimeError, match="the two updates differ"):
        update.main(["--model", model, "--batch", "16", "--rounds", "1", "--out", str(tmp_path / "lines.jsonl")])


def test_rounds_are_interleaved_and_warm_up_is_dropped():
    calls = []
    variants = {name: lambda number, name=name: calls.append((number, name)) or number for name in "ab"}
    laps = interleave(variants, 2, warmup=1)
    assert calls == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]
    assert [lap.work for lap in laps["a"]] == [1, 2]


def test_peak_memory_is_that_of_the_work():
    held = torch.ones(2**24)
    first, second = (memory.peak_bytes(lambda: torch.ones(2**24).sum()) for _ in range(2))
    assert first == pytest.approx(held.nbytes, rel=0.1)
    assert second == pytest.approx(held.nbytes, rel=0.1)


def test_compare_marks_what_changed_by_more_than_15_percent(tmp_path, capsys):
    before, after = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    _write(before, {"rate_tok_s": 100.0, "wall_s": 1.0, "cpu_s": 2.0, "peak_bytes": 50.0})
    _write(after, {"rate_tok_s": 80.0, "wall_s": 1.2, "cpu_s": 2.2, "peak_bytes": 40.0})
    assert compare.main([str(before), str(after)]) == 1
    marks = {line.split()[6]: line.split()[10:] for line in capsys.readouterr().out.splitlines()}
    assert marks == {"rate_tok_s": ["worse"], "wall_s": ["worse"], "cpu_s": [], "peak_bytes": ["better"]}
    assert compare.main([str(before), str(before)]) == 0
    assert compare.main([str(after), str(before), "--threshold", "0.3"]) == 0


def test_compare_takes_the_newest_line_of_a_commit(tmp_path, capsys):
    path = tmp_path / "all.jsonl"
    for commit, wall_s in (("aaa1", 3.0), ("aaa1", 1.0), ("bbb2", 1.0)):
        _write(path, {"wall_s": wall_s}, commit)
    assert compare.main([f"{path}@aaa", f"{path}@bbb2"]) == 0
    assert "+0.0%" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds no results"):
        compare.main([f"{path}@ccc", str(path)])


def test_compare_misses_what_is_no_longer_measured(tmp_path, capsys):
    before, after = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    _write(before, {"wall_s": 1.0, "cpu_s": 1.0})
    _write(after, {"wall_s": 1.0})
    assert compare.main([str(before), str(after)]) == 1
    assert capsys.readouterr().out.splitlines()[1].endswith("missing")


def test_a_file_that_holds_something_else_is_refused_by_line(tmp_path):
    path = tmp_path / "odd.jsonl"
    _write(path, {"wall_s": 1.0})
    path.write_text(path.read_text() + "{}\n")
    (tmp_path / "odd.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(UserError, match="odd.png: not a file of benchmark results"):
        compare.main([str(tmp_path / "odd.png")] * 2)
    with pytest.raises(UserError, match="odd.jsonl, line 2: not a benchmark result"):
        results.read(path)


def test_baselines_are_named_by_gpu_or_cpu():
    assert results.hardware_name({"gpus": ["NVIDIA H200"], "cpu": "x", "cores": 16}) == "1x-nvidia-h200"
    assert results.hardware_name({"gpus": [], "cpu": "AMD EPYC (7B13)", "cores": 2}) == "amd-epyc-7b13-2-cores"


def test_new_baselines_do_not_make_a_checkout_dirty(tmp_path):
    def git(*words):
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    git("init")
    assert results.git_state(tmp_path) is None  # nothing of ours is tracked there
    for name in ("fastlatent/__init__.py", "benches/baselines/cpu.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    assert results.git_state(tmp_path)["dirty"] is False
    (tmp_path / "benches/baselines/cpu.jsonl").write_text("2")
    (tmp_path / "benches/baselines/gpu.jsonl").write_text("2")
    assert results.git_state(tmp_path)["dirty"] is False
    (tmp_path / "fastlatent/__init__.py").write_text("2")
    assert results.git_state(tmp_path)["dirty"] is True


def test_learning_reads_a_finished_run(tmp_path):
    run, out = _run_folder(tmp_path / "run", [0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.8, 0.8, 0.9]), tmp_path / "lines.jsonl"
    learning.main([str(run), "--out", str(out)])
    (row,) = results.read(out)
    assert (row["case"], row["variant"]) == ("hrpo_quickstart", "seed 3, 9 steps")
    assert row["metrics"]["reward_last"] == pytest.approx((0.7 + 0.8 * 3 + 0.9) / 5)
    assert row["facts"]["reward_first"] == pytest.approx(0.2)
    assert row["facts"]["reward_step_1"] == 0.1
    assert (row["facts"]["accuracy_before"], row["metrics"]["accuracy_after"]) == (0.125, 0.75)
    assert row["facts"]["steps_s"] == pytest.approx(18.0)
    assert row["facts"]["changes"] == {} and "alarms" not in row["facts"]  # nothing was latent
    assert (row["facts"]["accuracy_latents_off"], row["facts"]["gate_mean"]) == (0.5, 0.9)
    story = manifest.read(run)
    assert row["hardware"] == story["hardware"] and row["git"] == story["git"]
    assert 0 <= row["metrics"]["wall_s"] + 1 < 60  # the manifest knows whole seconds


def test_learning_tells_how_latents_began_and_ended_and_every_reward(tmp_path):
    start = tmp_path / "imitated"
    start.mkdir()
    (start / "fastlatent.json").write_text(json.dumps({"checkpoint": "step-000010", "config": {
        "recipe": "latent_sft_quickstart", "seed": 2, "model": {"path": "some/model"}}}))
    rewards = [0.5, 0.6, 0.7, 0.7, 0.8, 0.8, 0.8, 0.9, 0.9, 1.0]
    latent = {"latent/frac_tokens": 0.5, "latent/norm_ratio": 1.0, "thinking/mean_length": 9.0}
    accuracies = [{f"eval/accuracy_latents_{how}": value for how, value in zip(("on", "off", "shuffled"), row, strict=True)}
                  for row in ((0.6, 0.4, 0.1), (0.9, 0.3, 0.2))]
    run = _run_of(tmp_path / "run", {"recipe": "latent_grpo_quickstart", "seed": 0, "model": {"path": str(start)},
                                     "optim": {"lr": 2e-5}, "method": {"name": "latent_grpo", "delta": 0.0}}, [
        {"step": 0, "eval/accuracy": 0.6, "eval/thinking_length": 6.0} | accuracies[0],
        *({"step": i, "reward": reward, "time/step": 2.0} | latent for i, reward in enumerate(rewards, 1)),
        {"step": 10, "eval/accuracy": 0.9, "eval/thinking_length": 6.5},
        {"step": 10, "latent/effective_k": 1.5} | accuracies[1]])
    found = learning.result(run)
    facts = found.facts
    assert (found.case, found.variant) == ("latent_grpo_quickstart", "seed 0, 10 steps, optim.lr=2e-05")
    assert facts["changes"] == {"optim.lr": 2e-5} and facts["rewards"] == rewards
    assert (facts["model"], facts["start"]) == ("some/model", "latent_sft_quickstart, seed 2, step-000010")
    assert [facts[f"accuracy_latents_{how}_before"] for how in ("on", "off", "shuffled")] == [0.6, 0.4, 0.1]
    assert [facts[f"accuracy_latents_{how}"] for how in ("on", "off", "shuffled")] == [0.9, 0.3, 0.2]
    assert (facts["thinking_before"], facts["thinking_after"], facts["thinking_length"]) == (6.0, 6.5, 9.0)
    assert (facts["alarms"], facts["effective_k"]) == ("quiet", 1.5)
    assert found.metrics()["reward_last"] == pytest.approx(0.88) and facts["reward_first"] == pytest.approx(0.6)


def test_learning_tells_of_an_alarm_that_sounded(tmp_path):
    shares = [0.6] * 5 + [0.1] * 5
    run = _run_of(tmp_path / "run", {"recipe": "hrpo_quickstart", "seed": 0, "model": {"path": "some/model"}}, [
        {"step": i, "reward": 0.5, "time/step": 2.0, "latent/frac_tokens": share} for i, share in enumerate(shares, 1)])
    assert learning.result(run).facts["alarms"] == "share"


def test_learning_reads_a_run_that_imitated(tmp_path, capsys):
    losses = [4.0, 3.0, 2.0, 1.0, 0.5, 0.5, 0.5, 0.5]
    run = _run_of(tmp_path / "run", {"recipe": "latent_sft_quickstart", "seed": 1, "model": {"path": "some/model"}}, [
        {"step": 0, "eval/accuracy": 0.0, "eval/thinking_length": 24.0},
        *({"step": i, "sft/loss": loss, "time/step": 2.0, "thinking/mean_length": 5.0} for i, loss in enumerate(losses, 1)),
        {"step": 8, "eval/accuracy": 0.75, "eval/thinking_length": 6.25}, {"step": 8, "eval/accuracy_latents_off": 0.5}])
    learning.main([str(run), "--out", str(tmp_path / "lines.jsonl")])
    (row,) = results.read(tmp_path / "lines.jsonl")
    facts = row["facts"]
    assert (row["case"], row["variant"]) == ("latent_sft_quickstart", "seed 1, 8 steps")
    assert (facts["losses"], facts["loss_first"], facts["loss_last"]) == (losses, 3.0, 0.6)
    assert row["metrics"].keys() == {"accuracy_after", "wall_s"} and row["metrics"]["accuracy_after"] == 0.75
    assert (facts["thinking_after"], facts["accuracy_latents_off"]) == (6.25, 0.5)
    assert not {"thinking_length", "alarms", "rewards"} & facts.keys()  # a demonstration's length is no model's
    assert "loss 3.000 -> 0.600, held-out accuracy 0.000 -> 0.750 at 6.2 tokens of thinking" in capsys.readouterr().out


def test_learning_refuses_an_unfinished_run(tmp_path):
    with pytest.raises(UserError, match="wanted a finished run"):
        learning.main([str(_run_folder(tmp_path / "run", [0.1, 0.2])), "--out", str(tmp_path / "lines.jsonl")])
    assert not (tmp_path / "lines.jsonl").exists()


def _write(path, metrics, commit="abc123"):
    line = Result(bench="b", case="c", variant="v", samples={name: [value] for name, value in metrics.items()})
    results.append([line], MACHINE | {"git": {"commit": commit, "dirty": False}}, path)
    assert json.loads(path.read_text().splitlines()[-1])["metrics"] == metrics


def _run_folder(folder, rewards):
    return _run_of(folder, {"recipe": "hrpo_quickstart", "seed": 3, "model": {"path": "tiny"}}, [
        {"step": 0, "eval/accuracy": 0.125},
        *({"step": i, "reward": reward, "time/step": 2.0} for i, reward in enumerate(rewards, 1)),
        {"step": len(rewards), "eval/accuracy": 0.75},
        {"step": len(rewards), "eval/accuracy_latents_off": 0.5, "latent/gate_mean": 0.9}])


def _run_of(folder, config, rows):
    """The folder of a finished run with this configuration and log."""
    folder.mkdir()
    manifest.create(folder, config, ["train"], "f", {})
    log = MetricsLog(folder)
    log.append(*rows)
    log.close()
    (folder / "report.html").write_text("done")
    return folder
