"""How a backend is chosen, refused and named."""

import subprocess
import sys

import pytest
import torch
from fastlatent_kernels import BackendUnavailable, dispatch, hrpo_gate, topk_mixture, use_backend
from fastlatent_kernels.hrpo_gate.cases import TEST_SHAPES, make_inputs
from fastlatent_kernels.overview import choices


def topk_args(dtype=torch.float32):
    return torch.randn(2, 9).to(dtype), 1.0, 3, 1.0, torch.tensor(0), torch.zeros(2, 3, dtype=torch.int64), False


@pytest.fixture
def toy(monkeypatch):
    """An op of one argument whose two backends sit in no module of their own."""
    monkeypatch.setattr(dispatch, "OPS", {})
    monkeypatch.setattr(dispatch, "_load", lambda module: "rocket is not installed" if "rocket" in module else None)

    @dispatch.op(backends=("rocket", "fast", "slow"))
    def double(x):
        return x + x, "reference"

    @double.backend("fast", supports=lambda x: None if x > 0 else "fast needs a positive number")
    def fast(x):
        return 2 * x, "fast"

    @double.backend("slow", supports=lambda x: None if x > -5 else "slow needs a number above -5",
                    slower=lambda x: "the reference doubles -2 in less time" if x == -2 else None)
    def slow(x):
        return 2 * x, "slow"

    return double


def test_the_first_backend_that_can_is_chosen(toy):
    assert [toy(x) for x in (1, -1, -9)] == [(2, "fast"), (-2, "slow"), (-18, "reference")]
    assert [toy.chosen(x) for x in (1, -1, -9)] == ["fast", "slow", "reference"]


def test_a_backend_asked_for_by_name_runs_or_raises_with_its_reason(toy):
    assert toy(1, backend="slow") == (2, "slow") and toy(1, backend="reference") == (2, "reference")
    for name, x, reason in (("fast", -1, "fast needs a positive number"), ("rocket", 1, "rocket is not installed"),
                            ("warp", 1, r"warp is no backend of it \(it has rocket, fast, slow, reference\)")):
        with pytest.raises(BackendUnavailable, match=f"^double: {reason}$"):
            toy(x, backend=name)
        with use_backend(name), pytest.raises(BackendUnavailable, match=f"^double: {reason}$"):
            toy(x)
        with use_backend(name), pytest.raises(BackendUnavailable):
            toy.chosen(x)
    with use_backend("slow"):
        assert toy(1) == (2, "slow")
        with use_backend("fast"):
            assert toy(1) == (2, "fast")
        assert toy(1) == (2, "slow")
    assert toy(1) == (2, "fast")


def test_a_backend_measured_slower_is_passed_over_and_still_runs_by_name(toy):
    assert toy(-2) == (-4, "reference") and toy.chosen(-2) == "reference"
    assert toy.why_not("slow", -2) is None
    assert toy.passed_over("slow", -2) == "the reference doubles -2 in less time"
    assert toy.passed_over("slow", -1) is None and toy.passed_over("fast", 1) is None
    assert toy(-2, backend="slow") == (-4, "slow")
    with use_backend("slow"):
        assert toy(-2) == (-4, "slow")


def test_interpreted_triton_runs_when_named_and_is_never_chosen():
    if torch.cuda.is_available():
        return  # nothing is interpreted
    inputs = make_inputs(TEST_SHAPES[1], dtype=torch.float32, device="cpu")
    assert hrpo_gate.why_not("triton", **inputs) is None
    assert hrpo_gate.passed_over("triton", **inputs) == "its interpreter is for tests: name it to run it"
    assert hrpo_gate.chosen(**inputs) != "triton"
    with use_backend("triton"):
        assert hrpo_gate.chosen(**inputs) == "triton"
        (choice, *_) = [choice for choice in choices() if choice.op == "hrpo_gate"]
        assert choice.backend == "triton" and choice.passed_over.keys() == {"triton"}
        torch.testing.assert_close(hrpo_gate(**inputs), hrpo_gate(**inputs, backend="reference"))


def test_without_triton_everything_else_works():
    script = """
import sys
sys.modules["triton"] = None  # importing it raises ModuleNotFoundError, as where it is not installed
import torch
from fastlatent_kernels import OPS
from fastlatent_kernels.hrpo_gate.cases import TEST_SHAPES, make_inputs
from fastlatent_kernels.overview import choices
from fastlatent_kernels.topk_mixture.cases import TEST_SHAPES, make_inputs
assert "triton" not in {choice.backend for choice in choices()}
for choice in choices():
    assert ("triton" in OPS[choice.op].order) == (choice.refusals.get("triton") == "triton is not installed"), choice
OPS["topk_mixture"](**make_inputs(TEST_SHAPES[1], dtype=torch.float32, device="cpu"))
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={"PYTHONPATH": "kernels"})


def test_only_a_missing_optional_package_means_unavailable(monkeypatch):
    def missing(name):
        def fail(module):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return fail

    monkeypatch.setattr(dispatch, "_loaded", {})
    monkeypatch.setattr(dispatch.importlib, "import_module", missing("triton"))
    assert hrpo_gate.why_not("reference") is None
    assert topk_mixture.why_not("native", *topk_args()) == "triton is not installed"
    monkeypatch.setattr(dispatch, "_loaded", {})
    monkeypatch.setattr(dispatch.importlib, "import_module", missing("fastlatent_kernels.oops"))
    with pytest.raises(ModuleNotFoundError, match="oops"):
        topk_mixture(*topk_args())


def test_native_refuses_what_it_cannot_run():
    assert topk_mixture.chosen(*topk_args()) == "native"
    assert topk_mixture.chosen(*topk_args(torch.float64)) == "reference"
    sentence = "^topk_mixture: native takes float32 and bfloat16 tensors on the CPU$"
    with pytest.raises(BackendUnavailable, match=sentence):
        topk_mixture(*topk_args(torch.float64), backend="native")


def overview(**environment: str) -> list[str]:
    return subprocess.run([sys.executable, "-m", "fastlatent_kernels"], capture_output=True, text=True, check=True,
                          env={"PYTHONPATH": "kernels"} | environment).stdout.splitlines()


def test_the_overview_says_which_backend_is_passed_over():
    lines = [line.strip() for line in overview(TRITON_INTERPRET="1")]
    at = next(i for i, line in enumerate(lines) if line.split()[:4] == ["topk_mixture", "cpu", "float32", "native"])
    assert lines[at + 1] == "passed over triton: its interpreter is for tests: name it to run it"


def test_the_environment_names_a_backend_and_the_overview_says_what_it_does():
    lines = overview(FASTLATENT_BACKEND="native")
    assert any(line.split()[:4] == ["topk_mixture", "cpu", "float32", "native"] for line in lines)
    at = next(i for i, line in enumerate(lines) if line.split()[:4] == ["group_advantage", "cpu", "float32", "none"])
    assert {line.strip().partition(": ")[2] for line in lines[at + 1:at + 3]} == {
        "native is no backend of it (it has triton, reference)",
        "triton takes CUDA tensors; TRITON_INTERPRET=1 runs it on a CPU, for tests"}
    assert {choice.op for choice in choices()} == set(dispatch.OPS)
    on_cpu = [choice for choice in choices() if choice.op == "vocab_head" and choice.device == "cpu"]
    assert {choice.backend for choice in on_cpu} == {"native"}
