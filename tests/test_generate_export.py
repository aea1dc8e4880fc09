"""What was trained can be asked, measured and handed on, with the weights and the decoding it was trained with."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from pathlib import Path
from statistics import fmean

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastlatent import build, checkpoint, evaluate, export, generate, train
from fastlatent.cli import run_command
from fastlatent.errors import UserError
from fastlatent.evaluate import interval, pass_at_k
from fastlatent.log import read
from fastlatent.packing import varlen
from fastlatent.rollout.hf_engine import HFEngine
from fastlatent.trained import open_run
from fastlatent.types import Batch

WORDS = ["model.path=model", "model.dtype=float32", "data.name=jsonl", "data.train=rows.jsonl", "data.held_out_size=4",
         "data.answer_after=####", "num_steps=2", "num_prompts=4", "group_size=4", "optim.lr=1e-3",
         "eval.every=1", "eval.num_prompts=4", "eval.ablations=false", "checkpoint.every=1", "checkpoint.keep=9",
         "log.live=quiet", "rewards=[{name: parity.parity}, {name: exact_number, weight: 0.0}]"]
RUNS = {"full": ["hrpo_quickstart"], "lora": ["hrpo_quickstart", "model.lora={r: 4, alpha: 64}", "sampling.top_k=20"],
        "plain": ["grpo_quickstart"]}
QUESTION = "Tom has 12 apples and buys 30 more."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three runs of two steps, in a folder with a file of answered questions."""
    path = tmp_path_factory.mktemp("use")
    tiny.save(path / "model", is_tied=True)
    (path / "parity.py").write_text("def parity(completion):\n    return float(len(completion) % 2)\n")
    rows = [{"question": f"Tom has {n} apples and buys 30 more.", "answer": f"so\n#### {n + 30}"} for n in range(16)]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.syspath_prepend(path)
        patch.setattr("fastlatent.trainer.write_report", lambda run: None)
        for name, words in RUNS.items():
            train.main([*words, *WORDS, f"out={name}"])
    return path


@pytest.fixture
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture
def another_model(inside):
    """What lies at the runs' model.path has been trained on; and its configuration, once `config()` is called."""
    model = AutoModelForCausalLM.from_pretrained("model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-3
    os.rename("model", "before")
    shutil.copytree("before", "model")
    model.save_pretrained("model")
    shutil.copy("before/config.json", "model/config.json")
    yield lambda: Path("model/config.json").write_text(Path("before/config.json").read_text().replace("1e-06", "1e-05"))
    shutil.rmtree("model")
    os.rename("before", "model")


def test_a_run_is_refused_where_another_model_took_the_place_of_its_own(another_model, tmp_path):
    def refused(main, *words):
        with pytest.raises(UserError, match=r"^model.path: \S+ has changed since the run in \S+ was started; wanted the model"):
            main([*words])

    for main, *words in ((generate.main, QUESTION), (evaluate.main, "--limit=1"), (export.main, str(tmp_path / "new"))):
        refused(main, "lora", *words)
    for name in ("lora", "full"):
        refused(train.main, *RUNS[name], *WORDS, f"out={name}", "resume=auto")
    open_run("full")  # all of its weights are in its checkpoints
    another_model()
    refused(generate.main, "full", QUESTION)
    Path("full/manifest.json").rename(tmp_path / "manifest.json")
    open_run("full")
    (tmp_path / "manifest.json").rename("full/manifest.json")


def test_a_run_is_refused_where_another_tokenizer_took_the_place_of_its_own(inside, tmp_path):
    """Of the same size: two tokens have each other's id."""
    file = Path("model/tokenizer.json")
    own = file.read_text()
    tree = json.loads(own)
    ids = tree["model"]["vocab"]
    ids["0"], ids["1"] = ids["1"], ids["0"]
    try:
        file.write_text(json.dumps(tree))
        for main, *words in ((generate.main, QUESTION), (evaluate.main, "--limit=1"), (export.main, str(tmp_path / "new"))):
            for name in ("lora", "full"):
                with pytest.raises(UserError, match="^model.path: tokenizer.json has changed since the run in "):
                    main([name, *words])
        with pytest.raises(UserError, match="^model.path: tokenizer.json has changed since the run in full was started"):
            train.main([*RUNS["full"], *WORDS, "out=full", "resume=auto"])
    finally:
        file.write_text(own)
    open_run("full")


# ---- generate -------------------------------------------------------------------------------------------------------


def test_generate_prints_thinking_answer_and_what_the_latents_did(inside, capsys):
    generate.main(["full", QUESTION, "--checkpoint", "last"])
    out = capsys.readouterr().out
    ((rollout, text),) = generate.draw(open_run("full", "last"), QUESTION)
    thinking, _, answer = text.partition("####")
    assert sum(rollout.latent) > 0
    assert f"thinking: {thinking.strip()}" in out and f"answer:   {answer.strip()}" in out
    counts = f"{rollout.num_thinking} thinking, {sum(rollout.latent)} read as latents"
    assert f"tokens:   {len(rollout.token_ids)} ({counts}" in out


def test_samples_differ_and_a_greedy_answer_does_not(inside, capsys):
    trained = open_run("full", "last")
    greedy = [generate.draw(trained, QUESTION)[0][0].token_ids for _ in range(2)]
    assert greedy[0] == greedy[1]
    drawn = generate.draw(trained, QUESTION, num_samples=3, greedy=False)
    assert len({tuple(rollout.token_ids) for rollout, _ in drawn}) == 3
    generate.main(["full", QUESTION, "--samples", "3"])
    assert capsys.readouterr().out.count("tokens:   ") == 3


def test_a_checkpoint_is_chosen_by_step_or_by_what_it_is(inside, capsys):
    newest = checkpoint.load(checkpoint.latest(Path("full")))
    assert open_run("full", "last").step == newest.step == 2
    assert open_run("full", "1").step == 1
    assert open_run("full").step == newest.state["best_step"]
    with pytest.raises(SystemExit) as exit_:
        run_command(generate.main, ["full", QUESTION, "--checkpoint", "7"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: --checkpoint: '7' is not best, last or one of the steps 1, 2\n"


# ---- evaluate -------------------------------------------------------------------------------------------------------


def brute_force(num_samples: int, num_correct: int, k: int) -> float:
    """Share of the k-subsets of the samples that hold a right one."""
    samples = [True] * num_correct + [False] * (num_samples - num_correct)
    return fmean(any(chosen) for chosen in itertools.combinations(samples, k))


def test_pass_at_k_counts_subsets():
    for num_samples in range(1, 8):
        for num_correct, k in itertools.product(range(num_samples + 1), range(1, num_samples + 1)):
            assert pass_at_k(num_samples, num_correct, k) == pytest.approx(brute_force(num_samples, num_correct, k))


@pytest.mark.parametrize("num_right, num_questions", [(0, 1), (1, 1), (0, 5), (5, 5), (2, 4), (31, 128), (128, 128)])
def test_the_interval_holds_the_means_that_do_not_contradict_what_was_seen(num_right, num_questions):
    """Its ends lie 1.96 standard errors of their own from the mean that was seen, or at the end of what a mean can be."""
    seen = num_right / num_questions
    low, high = interval([1.0] * num_right + [0.0] * (num_questions - num_right))
    assert 0 <= low <= seen <= high <= 1 and high - low > 0.02
    for end in (low, high):
        is_edge = seen in (0, 1) and end == pytest.approx(seen)
        assert is_edge or abs(end - seen) == pytest.approx(1.96 * (end * (1 - end) / num_questions) ** 0.5)
    assert interval([0.5] * 4) == interval([0.0, 0.0, 1.0, 1.0])  # shares: never narrower than if they were rights and wrongs


def printed(out: str) -> dict[str, list[float]]:
    """The numbers of each printed line by its first word."""
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    return {name: [float(number) for number in re.findall(r"\d+\.?\d*", rest)] for name, rest in lines
            if name not in ("checkpoint", "samples")}


def test_evaluate_says_what_its_samples_say(inside, capsys):
    evaluate.main(["full", "--data", "rows.jsonl", "--samples", "4", "--limit", "6", "--checkpoint", "last"])
    numbers, rows = printed(capsys.readouterr().out), read(inside / "full" / "evaluation-000002.jsonl")
    assert len(rows) == 6 * 4
    # by the run's own data.answer_after
    assert [row["answer"] for row in rows[::4]] == [str(n + 30) for n in range(6)]
    correct = [sum(row["rewards"]["parity"] for row in rows[i : i + 4]) for i in range(0, 24, 4)]
    assert len(set(correct)) > 1
    for k in (1, 2, 4):
        values = [brute_force(4, int(c), k) for c in correct]
        assert numbers[f"pass@{k}"][0] == pytest.approx(fmean(values), abs=1e-4)
        assert numbers[f"pass@{k}"][1:] == pytest.approx([95, *interval(values)], abs=1e-4)
    assert numbers["length"][0] == pytest.approx(fmean(row["num_tokens"] for row in rows), abs=0.051)
    assert numbers["length"][1] == pytest.approx(fmean(row["num_thinking"] for row in rows), abs=0.051)
    share = sum(row["num_latent"] for row in rows) / sum(row["num_tokens"] for row in rows)
    assert numbers["latent"][0] == pytest.approx(100 * share, abs=0.051) and share > 0.3


def test_evaluation_afterwards_is_the_evaluation_of_training(inside, capsys):
    """The same held-out questions, decoding and weights: the same accuracy."""
    metrics = read(inside / "full" / "metrics.jsonl")
    logged = {row["step"]: row["eval/accuracy"] for row in metrics if "eval/accuracy" in row}
    for step in (1, 2):
        evaluate.main(["full", "--checkpoint", str(step), "--out", f"greedy-{step}.jsonl"])
        assert printed(capsys.readouterr().out)["accuracy"][0] == pytest.approx(logged[step], abs=1e-4)
        assert len(read(inside / f"greedy-{step}.jsonl")) == 4


def test_rewards_that_cannot_be_had_are_told_and_null(inside, capsys):
    source = (inside / "parity.py").read_text()
    (inside / "parity.py").write_text("def parity(completion):\n    raise ValueError('not today')\n")
    try:
        evaluate.main(["plain", "--out", "missing.jsonl"])
    finally:
        (inside / "parity.py").write_text(source)
    reason = "parity: ValueError: not today (parity.py:2)"
    assert f"warning: 4 of 4 have no reward parity and count as wrong ({reason})\n" in capsys.readouterr().out

    def refuse(word):
        raise AssertionError(word)

    rows = [json.loads(line, parse_constant=refuse) for line in (inside / "missing.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in rows] == [None] * 4 and rows[0]["rewards"]["exact_number"] == 0.0


# ---- an engine that fails -------------------------------------------------------------------------------------------


def failing(*_):
    raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")


@pytest.mark.parametrize("main, words", [(generate.main, [QUESTION]), (evaluate.main, ["--out", "kept.jsonl"])])
@pytest.mark.parametrize("call, doing", [("load_weights", "taking the weights of step 2"), ("generate", "drawing")])
def test_an_engine_that_fails_is_one_sentence_and_takes_nothing_with_it(inside, capsys, monkeypatch, main, words, call, doing):
    """Its traceback lies in the run's folder, where that can be written."""
    Path("kept.jsonl").write_text("of another evaluation")
    monkeypatch.setattr(HFEngine, call, failing)
    kept = Path("plain/engine-failure.txt")
    for is_writable, there in ((True, f"; its traceback is in {kept}\n"), (False, "\n")):
        if not is_writable:
            kept.unlink()
            kept.mkdir()
        with pytest.raises(SystemExit, match="^1$"):
            run_command(main, ["plain", *words, "--checkpoint", "last"])
        said = capsys.readouterr()
        assert said.err.startswith(f"error: the engine failed while {doing}") and said.err.count("\n") == 1
        assert said.err.endswith(f": RuntimeError: CUDA error: out of memory{there}") and said.out == ""
        assert not is_writable or "TORCH_USE_CUDA_DSA" in kept.read_text()
    kept.rmdir()
    assert Path("kept.jsonl").read_text() == "of another evaluation"


# ---- export ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS)
@torch.no_grad()
def test_an_exported_model_is_the_policy_to_stock_transformers(inside, tmp_path, run):
    out = tmp_path / "deep" / "exported"
    export.main([run, str(out), "--checkpoint", "last"])
    trained = open_run(run, "last")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.float32 and model.config._attn_implementation == "sdpa"
    assert not any("lora" in name for name, _ in model.named_parameters())
    text = trained.tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == trained.tokenizer.encode(text, add_special_tokens=False)
    published = dict(trained.policy.published())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, published[name]), name
    logits = model(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(logits, policy_logits(trained, ids), atol=1e-4, rtol=1e-4)
    start = tiny.model(is_tied=True)(torch.tensor([ids])).logits[0, -1]
    assert (logits - start).abs().max() > 1e-3  # training moved it


def policy_logits(trained, ids: list[int]) -> torch.Tensor:
    """Logits after a prompt by the policy's own packed forward pass."""
    T, nothing = len(ids), torch.zeros(1)
    batch = Batch(
        token_ids_T=torch.tensor(ids), position_T=torch.arange(T), latent_T=torch.zeros(T, dtype=torch.bool),
        record_T=None, varlen=varlen([T]), score_A=torch.tensor([T - 1]), sequence_A=torch.zeros(1, dtype=torch.int64),
        target_A=torch.zeros(1, dtype=torch.int64),
        behaviour_logprob_A=nothing, advantage_A=nothing, weight_A=nothing)
    return trained.policy.hidden(batch)[-1] @ trained.policy.head_weight.T


def test_the_methods_own_parameters_lie_beside_the_model(inside, tmp_path):
    export.main(["full", str(tmp_path / "full")])
    export.main(["plain", str(tmp_path / "plain")])
    stored, trained = load_file(tmp_path / "full" / "method.safetensors"), open_run("full")
    assert stored.keys() == trained.policy.method.state_dict().keys() and "gate_lambda" in stored
    assert all(torch.equal(stored[name], tensor) for name, tensor in trained.policy.method.state_dict().items())
    assert not (tmp_path / "plain" / "method.safetensors").exists()
    facts = json.loads((tmp_path / "full" / "fastlatent.json").read_text())
    assert facts["config"]["method"]["name"] == "hrpo" and facts["checkpoint"] == trained.path.name


def test_weights_can_be_exported_in_half_precision(inside, tmp_path):
    export.main(["lora", str(tmp_path / "half"), "--dtype", "bfloat16"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    published = dict(open_run("lora").policy.published())
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, published[name].bfloat16()), name


def test_an_export_is_whole_or_absent(inside, tmp_path, monkeypatch, capsys):
    (tmp_path / "there").mkdir()
    with pytest.raises(SystemExit) as exit_:
        run_command(export.main, ["full", str(tmp_path / "there")])
    assert exit_.value.code == 2 and "exists already; wanted a new folder" in capsys.readouterr().err
    monkeypatch.setattr(export, "save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match=r"new cannot be written \(disk full\)"):
        export.main(["full", str(tmp_path / "new")])
    assert os.listdir(tmp_path) == ["there"] and not os.listdir(tmp_path / "there")


def test_an_exported_model_can_be_trained_again(inside, tmp_path):
    export.main(["plain", str(tmp_path / "again")])
    trained = open_run("plain")
    trained.config.model.path = str(tmp_path / "again")
    again = build.policy(trained.config).trainable()
    assert again.keys() == trained.policy.trainable().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in trained.policy.trainable().items())
