"""How a backend is chosen, refused and named."""

import subprocess
import sys

import pytest
import torch
from fastlatent_kernels import OPS, BackendUnavailable, dispatch, hrpo_gate, measured, topk_mixture, use_backend
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
                    rule=lambda x: "the reference doubles -2 in less time" if x == -2 else None)
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


def test_a_backend_passed_over_by_rule_still_runs_by_name(toy):
    assert toy(-2) == (-4, "reference") and toy.chosen(-2) == "reference"
    assert toy.why_not("slow", -2) is None
    assert toy.passed_over("slow", -2) == "the reference doubles -2 in less time"
    assert toy.passed_over("slow", -1) is None and toy.passed_over("fast", 1) is None
    assert toy(-2, backend="slow") == (-4, "slow")
    with use_backend("slow"):
        assert toy(-2) == (-4, "slow")


@pytest.fixture
def measured_toy(monkeypatch):
    """An op with two backends that run everything, of which something was measured on a CPU."""
    monkeypatch.setattr(dispatch, "OPS", {})
    monkeypatch.setattr(dispatch, "_load", lambda module: None)
    monkeypatch.setattr(measured, "TABLE", measured.table([
        {"op": "double", "backend": backend, "device": "cpu", "direction": direction, "dtype": dtype, "rows": rows,
         "speed": speed, "machine": "a machine"}
        for (backend, direction, dtype), points in {
            ("fast", "forward", "float32"): {100: 2.0, 1: 0.5, 10000: 0.9},
            ("fast", "both", "float32"): {1: 1.5, 100: 0.8}, ("fast", "forward", "bfloat16"): {1: 4.0, 100: 0.7},
            ("sure", "forward", "float32"): {100: 1.0, 1: 3.0}}.items()
        for rows, speed in points.items()]))

    @dispatch.op(backends=("fast", "sure"))
    def double(x_N, times=2):
        return "reference"

    for name in ("fast", "sure"):
        double.backend(name, supports=lambda *args, **kwargs: None)(lambda *args, name=name, **kwargs: name)
    return double


def test_the_choice_follows_what_was_measured_nearest_in_rows(measured_toy):
    # halfway between 1 and 100, as ratios, are 10 rows; between 100 and 10000 they are 1000
    chosen = {rows: measured_toy(torch.empty(rows)) for rows in (0, 1, 10, 11, 100, 1000, 1001, 50000)}
    assert chosen == {0: "sure", 1: "sure", 10: "sure", 11: "fast", 100: "fast", 1000: "fast", 1001: "sure", 50000: "sure"}
    assert measured_toy(x_N=torch.empty(1), times=3) == "sure" and measured_toy(torch.empty(1), backend="fast") == "fast"
    assert measured_toy.passed_over("fast", torch.empty(3)) == (
        "0.5 times the reference's speed, measured at 1 row (a machine)")
    assert measured_toy.passed_over("fast", torch.empty(2000)).startswith("0.9 times the reference's speed, measured at 1")
    assert measured_toy.passed_over("sure", torch.empty(5)) is None
    assert measured_toy(torch.empty(1, device="meta")) == "fast"  # of which nothing was measured
    assert measured_toy.measured["fast", "cpu"].told("float32") == (
        "times the reference's speed: forward 0.5 at 1 row, 2 at 100 rows, 0.9 at 10000 rows; "
        "both 1.5 at 1 row, 0.8 at 100 rows (a machine)")


def test_a_call_that_learns_goes_by_what_was_measured_with_its_backward_pass(measured_toy):
    few, many = torch.empty(1, requires_grad=True), torch.empty(100, requires_grad=True)
    assert [measured_toy(few), measured_toy(x_N=many), measured_toy(many, times=few)] == ["fast", "sure", "sure"]
    with torch.no_grad():
        assert [measured_toy(few), measured_toy(many)] == ["sure", "fast"]
    assert measured_toy.passed_over("fast", many) == (
        "0.8 times the reference's speed, measured at 100 rows (a machine)")
    assert measured_toy.passed_over("sure", many) is None  # measured forward alone


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_goes_by_what_was_measured_with_it(measured_toy, dtype):
    assert [measured_toy(torch.empty(rows, dtype=dtype)) for rows in (1, 100)] == ["fast", "sure"]
    assert measured_toy(torch.empty(1, dtype=torch.int64), times=torch.empty(5, dtype=dtype)) == "fast"
    assert measured_toy(torch.empty(1, dtype=dtype, requires_grad=True)) == "fast"  # measured forward alone
    assert measured_toy.passed_over("sure", torch.empty(1, dtype=dtype)) is None  # not measured


def test_compiled_code_chooses_by_rows(measured_toy):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + (1 if measured_toy(x) == "fast" else 2), fullgraph=True, backend="eager")
    assert [compiled(torch.zeros(rows))[0].item() for rows in (1, 100, 200, 3, 5000)] == [2, 1, 1, 2, 2]


def test_what_is_committed_is_of_backends_there_are_and_is_followed():
    assert {"cpu"} <= {device for op in OPS.values() for _, device in op.measured}
    assert measured.TABLE.keys() <= OPS.keys()
    for op in OPS.values():
        for (backend, device), known in op.measured.items():
            assert backend in op.order and device in ("cpu", "cuda")
            for (direction, dtype), points in known.points.items():
                assert direction in ("forward", "both") and dtype in ("float32", "bfloat16")
                rows = [num_rows for num_rows, _ in points]
                assert rows == sorted(set(rows)) and len(rows) >= 2, "from how many rows on is it faster?"
                for num_rows, speed in points:
                    said = known.slower(num_rows, direction == "both", dtype == "bfloat16")
                    assert (said is None) == (speed >= 1) and speed > 0


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
        assert choice.backend == "triton" and "triton" in choice.passed_over
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
    assert any(line.split()[:5] == ["topk_mixture", "cpu", "float32", "native", "times"] for line in overview())
    lines = overview(FASTLATENT_BACKEND="native")
    assert any(line.split()[:4] == ["topk_mixture", "cpu", "float32", "native"] for line in lines)
    at = next(i for i, line in enumerate(lines) if line.split()[:4] == ["group_advantage", "cpu", "float32", "none"])
    assert {line.strip().partition(": ")[2] for line in lines[at + 1:at + 3]} == {
        "native is no backend of it (it has triton, reference)",
        "triton takes CUDA tensors; TRITON_INTERPRET=1 runs it on a CPU, for tests"}
    assert {choice.op for choice in choices()} == set(dispatch.OPS)
    on_cpu = [choice for choice in choices() if choice.op == "vocab_head" and choice.device == "cpu"]
    assert {choice.backend for choice in on_cpu} == {"native"}
