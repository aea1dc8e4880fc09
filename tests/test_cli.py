"""Bad input is one sentence on stderr and exit code 2, found before a model is loaded, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from omegaconf import OmegaConf

import fastlatent
from fastlatent import evaluate, export, generate, models, train
from fastlatent.cli import run_command
from fastlatent.config import load_config, to_dict

GOOD = ["grpo_quickstart", "model.path=model", "data.name=jsonl", "data.train=rows.jsonl", "num_prompts=4",
        "eval.every=0", "num_steps=1", "chat.max_prompt_tokens=64", "sampling.max_new_tokens=32"]
FILES = {
    "not-json.jsonl": '{"question": "a?", "answer": 1}\n\n{"question": "b?", "answer": }\n',
    "no-object.jsonl": '{"question": "a?", "answer": 1}\n[1]\n',
    "no-column.jsonl": '{"question": "a?", "anwser": 1}\n',
    "no-answer.jsonl": '{"question": "a?", "answer": ""}\n',
    "empty.jsonl": "\n",
    "two.jsonl": '{"question": "a?", "answer": 1}\n' * 2,
    "long.jsonl": '{"question": "a?", "answer": 1}\n' * 5 + json.dumps({"question": "ab " * 99, "answer": 1}) + "\n",
    "broken.yaml": "optim:\n  lr: [1\n",
    "file": "",
    "own.py": "def f(completion):\n    return 1.0\n",
    "wants.py": "def column(completion, difficulty):\n    return 1.0\n",
    "broken_reward.py": "raise RuntimeError('not today')\n",
    "old_reward.py": "import math\nhalf = math.halve(1)\n",
    "only_tokens.py": "from fastlatent.rollout.hf_engine import HFEngine\nfrom fastlatent.types import Capability\n"
                      "class Engine(HFEngine):\n    capabilities = frozenset({Capability.TOKENS})\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    tiny.save(path / "model")
    tiny.save(path / "no-template")
    (path / "no-template" / "chat_template.jinja").unlink()
    (path / "no-model").mkdir()
    (path / "used").mkdir()
    (path / "used" / "notes.txt").write_text("mine")
    rows = [{"question": f"{n} + 1?", "answer": n + 1} for n in range(8)]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, content in FILES.items():
        (path / name).write_text(content)
    (path / "run").mkdir()  # one that never came to save a checkpoint
    config = to_dict(load_config(*GOOD, f"model.path={path / 'model'}", "data.train=rows.jsonl"))
    (path / "run" / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    (path / "other-version").mkdir()
    (path / "other-version" / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config | {"colour": "red"})))
    (path / "broken").mkdir()
    (path / "broken" / "config.yaml").write_text("optim:\n  lr: [1\n")
    return path


@pytest.fixture
def inside(folder, monkeypatch):
    """In the folder, where no model can be loaded, nothing can be downloaded and nothing is in the cache."""

    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(models, "load_causal_lm", refuse)
    monkeypatch.setenv("FASTLATENT_CACHE", str(folder / "empty-cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return folder


def everything(folder: Path) -> set[str]:
    """Files and folders, without caches and locks."""
    paths = {str(path) for path in folder.rglob("*")}
    return {path for path in paths if "empty-cache" not in path and "__pycache__" not in path}


def sentence_of(main, argv: list[str], capsys) -> str:
    """What the command says when it refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run_command(main, argv)
    out, err = capsys.readouterr()
    assert exit_.value.code == 2
    assert out == "" and err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err


TRAIN = {
    # data
    "data.train=nowhere.jsonl": "nowhere.jsonl: cannot be read (No such file or directory)",
    "data.train=not-json.jsonl": "not-json.jsonl, line 3: not JSON (",
    "data.train=no-object.jsonl": "no-object.jsonl, line 2: wanted a JSON object, got list",
    "data.train=no-column.jsonl": "no-column.jsonl, line 1: there is no column 'answer'; did you mean 'anwser'?",
    "data.train=no-answer.jsonl": "no-answer.jsonl, line 1: column 'answer': the answer is empty",
    "data.train=empty.jsonl": "empty.jsonl: holds no rows",
    "data.train=two.jsonl": "data: 2 training rows are fewer than num_prompts=4",
    "data.train=long.jsonl": "long.jsonl, line 6: the prompt has ",
    "data.train=": "data.train: wanted a file",
    "data.name=jsnol": "data.name: 'jsnol' is not one of ",
    "eval.every=1": "eval.every: there is no held-out data",
    # models
    "model.path=./nowhere": "model.path: there is no folder './nowhere'",
    "model.path=no-model": "model.path: no-model is no Hugging Face folder: it holds no config.json",
    "model.path=file": "model.path: file is a file",
    "model.path=no-template": "chat.template: no-template has no chat template",
    "sampling.max_new_tokens=2000 update.tokens_per_microbatch=4096":
        "model.path: the model reads at most 2048 tokens; wanted chat.max_prompt_tokens=64 and sampling.max_new_tokens=2000 "
        "to add",
    # recipes, files, keys, members
    "grpo_quickstrat": "'grpo_quickstrat' is not a recipe, a path to a yaml file or key=value; did you mean ",
    "nowhere.yaml": "nowhere.yaml: no such file",
    "broken.yaml": "broken.yaml, line ",
    "--fast": "unrecognized arguments: --fast",
    "optim.learning_rate=1": "optim.learning_rate: no such option; ",
    "optimizer.lr=1": "optimizer: no such option; ",
    "method.name=hrp": "method.name: 'hrp' is not one of ",
    "method.r_min=0.9": "method.r_min: no such option; ",
    "engine.name=vlllm": "engine.name: 'vlllm' is not one of ",
    "rewards=[{name: exact}]": "rewards.0.name: 'exact' is not one of ",
    "rewards=[{name: nowhere.reward}]": "rewards.0.name: 'nowhere.reward': no module named 'nowhere' can be imported",
    "rewards=[{name: own.g}]": "rewards.0.name: module 'own' has no 'g'",
    "rewards=[{name: ./own.py:f}]": "rewards.0.name: './own.py:f' is no dotted path; f in a file own.py here is own.f",
    "rewards=[{name: broken_reward.f}]": "rewards.0.name: importing 'broken_reward.f' failed with RuntimeError: not today",
    "rewards=[{name: old_reward.f}]": "rewards.0.name: importing 'old_reward.f' failed with AttributeError: module 'math' has",
    "rewards=[{name: wants.column}]": "rewards.0.name: wants.column wants a column 'difficulty'",
    "rewards=[]": "rewards: wanted at least one reward",
    # types and ranges
    "num_steps=many": "num_steps: wanted a whole number, got 'many'",
    "num_steps=2.5": "num_steps: wanted a whole number, got 2.5",
    "optim.lr=fast": "optim.lr: wanted a number, got 'fast'",
    "optim.lr=nan": "optim.lr: wanted a finite number, got nan",
    "model.gradient_checkpointing=maybe": "model.gradient_checkpointing: wanted true, false or selective, got 'maybe'",
    "optim=3": "optim: wanted a section, got 3",
    "group_size=1": "group_size: wanted at least 2, got 1",
    "sampling.temperature=0": "sampling.temperature: wanted more than 0, got 0",
    "objective.normalizer=mean": "objective.normalizer: 'mean' is not one of token_mean, sequence_mean, constant",
    "model.device=cuda": "model.device: cuda was asked for and torch sees no GPU here",
    "update.tokens_per_microbatch=95": "update.tokens_per_microbatch: wanted at least 96, the longest sequence "
                                       "(chat.max_prompt_tokens=64 and sampling.max_new_tokens=32), got 95",
    "chat.template=false chat.system=hi": "chat.system: a system prompt needs chat.template=true",
    # folders
    "out=file/run": "out: cannot use ",
    "out=file": "out: file is a file, wanted a folder",
    "out=used": "out: used is not empty; ",
    "out=/proc/nothing": "out: cannot use /proc/nothing: ",
    "resume=auto": "resume: no ",
    "resume=yes": "resume: ",
    # parts that do not fit each other
    "engine.name=only_tokens.Engine method.name=hrpo":
        "method 'hrpo' needs MIXTURE; engine 'only_tokens.Engine' offers TOKENS",
    "resume=auto out=used": "resume: used holds no run to go on with",
}


@pytest.mark.parametrize("words, sentence", TRAIN.items())
def test_training_on_bad_input(inside, monkeypatch, capsys, words, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = everything(inside)
    argv = [*GOOD, words] if words.startswith("rewards") else [*GOOD, *words.split(" ")]
    assert sentence in sentence_of(train.main, argv, capsys)
    assert everything(inside) == before


def test_the_good_words_of_these_tests_get_as_far_as_the_model(inside):
    with pytest.raises(AssertionError, match="a model was loaded"):
        train.main([*GOOD, "out=good"])


def test_a_start_that_fails_leaves_nothing_behind_and_nothing_open(inside):
    before = everything(inside)
    for _ in range(2):
        with pytest.raises(AssertionError, match="a model was loaded"):
            train.main([*GOOD, "out=failed"])
        assert everything(inside) == before


def test_a_model_name_that_does_not_exist_without_network(inside, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "model.path: no tokenizer could be loaded from 'nobody/nothing'" in sentence_of(
        train.main, [*GOOD, "model.path=nobody/nothing"], capsys)


def test_one_prompt_of_a_procedural_dataset_is_tried_before_the_model_loads(inside, capsys):
    words = ["grpo_quickstart", "model.path=model", "eval.every=0"]
    for more, sentence in (["chat.max_prompt_tokens=5"], "more than chat.max_prompt_tokens=5"), (
            ["chat.template=false", "chat.system=hi"], "chat.system: a system prompt needs chat.template=true"):
        assert sentence in sentence_of(train.main, [*words, *more], capsys)


def test_the_first_fetch_without_network(inside, capsys):
    before = everything(inside)
    with pytest.raises(SystemExit) as exit_:
        run_command(train.main, [*GOOD, "model.path=smollm2-135m-instruct"])
    out, err = capsys.readouterr()
    assert exit_.value.code == 2 and out == ""
    notice, sentence = err.splitlines()
    assert notice.startswith("fastlatent: fetching smollm2-135m-instruct")
    assert sentence.startswith("error: model.path: smollm2-135m-instruct could not be fetched")
    assert "needs a network" in sentence
    assert everything(inside) == before


USE = [
    (generate.main, ["nowhere", "2 + 2?"], "nowhere: is no run folder: it has no config.yaml"),
    (generate.main, ["nowhere"], "the following arguments are required: question"),
    (generate.main, ["nowhere", "2 + 2?", "--samples=-1"], "--samples: wanted 0 to 65536, got -1"),
    (evaluate.main, ["nowhere"], "nowhere: is no run folder"),
    (evaluate.main, ["nowhere", "--data", "nowhere.jsonl"], "--data: nowhere.jsonl: no such file"),
    (evaluate.main, ["nowhere", "--samples=-1"], "--samples: wanted 0 to 65536, got -1"),
    (evaluate.main, ["nowhere", "--samples=65537"], "--samples: wanted 0 to 65536, got 65537"),
    (evaluate.main, ["nowhere", "--limit=-1"], "--limit: wanted 0 or more, got -1"),
    (evaluate.main, ["nowhere", "--out", "nowhere/samples.jsonl"], "--out: nowhere is no folder"),
    (export.main, ["nowhere", "exported"], "nowhere: is no run folder"),
    (export.main, ["nowhere", "used"], "used: exists already; wanted a new folder"),
    (export.main, ["nowhere", "exported", "--dtype=int8"], "--dtype: invalid choice: 'int8'"),
    (generate.main, ["run", "2 + 2?"], "run: has no finished checkpoint"),
    (generate.main, ["run", "ab " * 99], "question: the prompt has "),
    (generate.main, ["run", "2 + 2?", "--engine=vllm"], "engine.name: vllm attends on a CPU with heads of "),
    (evaluate.main, ["run", "--data", "rows.jsonl", "--engine=vllm"], "engine.name: vllm attends on a CPU with heads of "),
    (generate.main, ["run", "2 + 2?", "--device=tpu"], "model.device: 'tpu' is not one of auto, cpu, cuda"),
    (evaluate.main, ["run"], "--data: the run has no held-out data of its own"),
    (evaluate.main, ["run", "--data", "rows.jsonl"], "run: has no finished checkpoint"),
    (evaluate.main, ["run", "--data", "not-json.jsonl"], "not-json.jsonl, line 3: not JSON ("),
    (evaluate.main, ["run", "--data", "no-column.jsonl"], "no-column.jsonl, line 1: there is no column 'answer'"),
    (evaluate.main, ["run", "--data", "long.jsonl"], "long.jsonl, line 6: the prompt has "),
    (evaluate.main, ["run", "--data", "rows.jsonl", "--out", "used"], "--out: used is a folder, wanted a file"),
    (evaluate.main, ["run", "--data", "rows.jsonl", "--out", "/proc/samples"], "--out: /proc/samples cannot be written ("),
    (generate.main, ["other-version", "2 + 2?"], "error: other-version/config.yaml: colour: no such option; "),
    (export.main, ["broken", "exported"], "error: broken/config.yaml, line "),
    (export.main, ["run", "exported"], "run: has no finished checkpoint"),
    (export.main, ["run", "/proc/exported"], "DIR: /proc/exported cannot be written ("),
]


@pytest.mark.parametrize("main, argv, sentence", USE)
def test_using_a_run_on_bad_input(inside, capsys, main, argv, sentence):
    before = everything(inside)
    assert sentence in sentence_of(main, argv, capsys)
    assert everything(inside) == before


@pytest.mark.parametrize("module, argv, sentence", [
    ("train", ["grpo_quickstart", "group_size=1"], "error: group_size: wanted at least 2, got 1\n"),
    ("generate", ["nowhere", "2 + 2?"], "error: nowhere: is no run folder: it has no config.yaml\n"),
])
def test_a_process_of_its_own_says_one_line_and_no_traceback(inside, module, argv, sentence):
    root = Path(fastlatent.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    command = [sys.executable, "-m", f"fastlatent.{module}", *argv]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.startswith(sentence) and done.stderr.count("\n") == 1, done.stderr
