"""The kernels' benchmark measures what it says: the right inputs, cold caches, rivals that compute the same."""

import csv
from functools import partial
from time import sleep

import pytest
import torch
from fastlatent_kernels import OPS

from benches import compare, kernels, kernels_bench, kernels_cases, kernels_clock, kernels_variants, readme, results
from benches.kernels_cases import DIRECTIONS
from benches.kernels_clock import Work
from benches.kernels_rivals import RIVALS, Rival
from benches.kernels_roofline import Ceilings
from fastlatent.errors import UserError

F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def no_compiler(monkeypatch):
    """torch.compile traces and runs, and no C++ compiler does."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def case_of(name, shape, dtype=F32):
    return kernels_cases.make(OPS[name], shape, dtype, "cpu")


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_measures_every_direction_beside_eager_and_compiled(no_compiler, tmp_path, capsys):
    out = tmp_path / "lines.jsonl"
    kernels.main(["--quick", "--device", "cpu", "--op", "group_advantage", "--op", "hrpo_gate", "--backend",
                  "reference", "--dtype", "float32", "--csv", "--out", str(out)])
    rows = results.read(out)
    seen = {(row["facts"]["op"], row["facts"]["direction"], row["variant"]) for row in rows}
    pairs = [("group_advantage", "forward"), *(("hrpo_gate", direction) for direction in DIRECTIONS)]
    assert seen == {(*pair, variant) for pair in pairs for variant in ("eager", "torch.compile")}
    for row in rows:
        facts, metrics = row["facts"], row["metrics"]
        limits = Ceilings(**facts["ceilings"])
        assert facts["gb_s"] == pytest.approx(facts["bytes_moved"] / metrics["wall_s"] / 1e9, rel=1e-3)
        p20, p80 = row["spread"]["wall_s"]
        both = (p20 - (p80 - p20) / 3, p80 + (p80 - p20) / 3)  # of two rounds, the quicker and the slower
        shares = [limits.floor_s(facts["bytes_moved"], facts["flops"]) / seconds for seconds in both]
        assert metrics["roofline_share"] == pytest.approx(sum(shares) / 2, rel=1e-3)
        assert facts["is_headline"] == (facts["direction"] == ("both" if facts["op"] == "hrpo_gate" else "forward"))
    printed = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["op"] for row in printed] == [row["facts"]["op"] for row in rows]
    assert float(printed[0]["p50_us"]) == pytest.approx(1e6 * rows[0]["metrics"]["wall_s"], rel=1e-3)


def test_a_quick_run_keeps_nothing_unless_told_where(no_compiler, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "BASELINES", tmp_path)
    kernels.main(["--quick", "--device", "cpu", "--op", "group_advantage", "--backend", "reference"])
    assert not list(tmp_path.iterdir())


def test_a_shape_beyond_a_cpu_is_noted_and_never_made(monkeypatch, capsys):
    limits = Ceilings(1e6, 1e6, "slow")
    monkeypatch.setattr(kernels_bench, "ceilings", lambda *_: limits)
    monkeypatch.setattr(kernels_cases, "make", lambda *_: pytest.fail("made"))
    kernels.main(["--device", "cpu", "--op", "hrpo_gate", "--model", "qwen2.5-1.5b", "--seconds", "0.001"])
    printed = capsys.readouterr().out
    moved = 5 * 32768 * 1536 * 2 + 32768
    assert printed.count("n/a: 5 forward passes at this CPU's roofline") == 3
    assert "T=32768 D=1536 bfloat16\n" in printed and f"take {5 * moved / 1e6:.0f} s" in printed


def test_a_headline_is_the_last_shape_of_as_many_rows_as_wanted(monkeypatch):
    seen = []
    monkeypatch.setattr(kernels_bench, "ceilings", lambda *_: Ceilings(1e12, 1e15, "fast"))
    monkeypatch.setattr(kernels_bench.Bench, "run", lambda bench, op, shape, is_last: seen.append((shape, is_last)) or [])
    kernels.main(["--device", "cpu", "--op", "hrpo_gate", "--headlines", "--rows", "4096"])
    assert seen == [({"T": 4096, "D": 1536}, True)]


@pytest.mark.parametrize(("words", "complaint"), [
    (["--op", "nope"], "--op: 'nope' is not one of clipped_surrogate"),
    (["--backend", "nope"], "--backend: 'nope' is not one of"),
    (["--ncu", "hrpo_gate", "--device", "cpu"], "--ncu: Nsight Compute profiles CUDA kernels"),
    (["--ncu", "nope", "--device", "cpu"], "--ncu: 'nope' is not one of"),
    (["--model", "gpt-5"], "invalid choice"), (["--quick", "--model", "qwen2.5-1.5b"], "not allowed with"),
    (["--threads", "0"], "--threads: wanted 1 or more"), (["--seconds", "0"], "--seconds: wanted a number above 0"),
    (["--rows", "0"], "--rows: wanted 1 or more")])
def test_bad_input_is_refused_in_a_sentence(words, complaint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=complaint) as caught:
        kernels.main(words)
    assert "\n" not in str(caught.value)


def test_the_device_must_be_the_one_that_lines_are_named_by(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="hide its GPUs"):
        kernels.main(["--device", "cpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        kernels.main(["--device", "cuda"])


@pytest.mark.gpu
def test_on_a_gpu_every_direction_is_a_graph(tmp_path):
    out = tmp_path / "lines.jsonl"
    kernels.main(["--quick", "--device", "cuda", "--op", "hrpo_gate", "--out", str(out)])
    rows = results.read(out)
    assert {row["facts"]["direction"] for row in rows} == set(DIRECTIONS)
    assert all(row["facts"]["cuda_graph"] and row["metrics"]["wall_s"] > 0 for row in rows)


# ---- cases ----------------------------------------------------------------------------------------------------------


def test_leaves_are_what_the_reference_gives_a_gradient_to():
    gate = case_of("hrpo_gate", {"T": 3, "D": 4})
    assert {name for name, value in gate.inputs.items() if value.requires_grad} == {
        "u_T2D", "token_TD", "mixture_TD", "bias_2D", "lambda_D"}
    assert gate.directions == DIRECTIONS
    assert case_of("group_advantage", {"S": 2, "G": 3}).directions == ("forward",)


def test_an_input_written_in_place_is_no_output_with_a_gradient():
    decode = case_of("hrpo_gate_decode", kernels_cases.module(OPS["hrpo_gate_decode"]).TEST_SHAPES[1])
    assert decode.directions == ("forward",)
    assert not any(value.requires_grad for value in decode.inputs.values() if isinstance(value, torch.Tensor))


def test_traffic_and_arithmetic_of_both_passes():
    gate = case_of("hrpo_gate", {"T": 3, "D": 4}, BF16)
    forward, gradients = 2 * 5 * 12 + 3, 2 * 4 * 12 + 4 * (8 + 4)
    assert [gate.bytes_moved(d) for d in DIRECTIONS] == [forward, forward + gradients, 2 * forward + gradients]
    assert [gate.flops(d) for d in DIRECTIONS] == [0, 0, 0]
    head = case_of("policy_gradient_head", {"A": 5, "D": 3, "V": 7})
    # its forward pass makes the gradients: three GEMMs there, and the backward pass reads and scales them
    assert [head.flops(d) for d in DIRECTIONS] == [6 * 5 * 3 * 7, 0, 6 * 5 * 3 * 7]
    assert head.bytes_moved("backward") == 2 * 4 * (5 * 3 + 7 * 3)


def test_a_model_gives_every_shape_its_sizes():
    shapes = kernels_cases.shapes(OPS["hrpo_gate"], "qwen2.5-1.5b", False)
    assert shapes == [{"T": t, "D": 1536} for t in (64, 4096, 32768)]  # once each
    shapes = kernels_cases.shapes(OPS["vocab_head"], "qwen2.5-1.5b", False)
    assert {(shape["D"], shape["V"]) for shape in shapes} == {(1536, 151936)}


def test_a_backward_pass_gives_autograds_gradients():
    case = case_of("token_logprob", {"A": 7, "D": 5, "V": 11})
    work = case.work(lambda: case.picked(case.op.reference(**case.inputs)), "backward")
    hidden, weight = (case.inputs[name].detach().double().requires_grad_() for name in ("hidden_AD", "weight_VD"))
    logp = (hidden @ weight.t() / case.inputs["temperature"]).log_softmax(1)
    entropy = -(logp.exp() * logp).sum(1)
    picked = logp.gather(1, case.inputs["target_A"][:, None])[:, 0]
    want = torch.autograd.grad((picked, entropy), (hidden, weight), tuple(c.double() for c in case.cotangents))
    for got, exact in zip(work.run(work.state()), want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5)


# ---- variants -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shape"), [("token_logprob", {"A": 7, "D": 65, "V": 131}),
                                             ("policy_gradient_head", {"A": 7, "D": 65, "V": 131})])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_liger_computes_the_same_with_the_same_gradients(name, shape, dtype, no_compiler):
    case = case_of(name, shape, dtype)
    rival = RIVALS[name]["liger-kernel"](case.inputs)
    ours = case.picked(case.op.reference(**case.inputs | rival.options))[0]
    theirs = rival.call()
    tolerance = 1e-4 if dtype == F32 else 5e-2
    cotangent = case.cotangents[0]
    pairs = [(theirs, ours), *zip(torch.autograd.grad(theirs, case.leaves, cotangent, allow_unused=True),
                                  torch.autograd.grad(ours, case.leaves, cotangent, allow_unused=True), strict=True)]
    compared = 0
    for got, want in pairs:
        if want is not None:
            compared += 1
            assert (got - want).float().norm() <= tolerance * want.float().norm()
    assert compared == 3


def test_a_rival_that_computes_something_else_is_not_timed(no_compiler, monkeypatch):
    wrong = lambda inputs: Rival(lambda: inputs["hidden_AD"].sum(1))
    monkeypatch.setitem(RIVALS, "token_logprob", {"wrong": wrong})
    works, refused = kernels_variants.lineup(case_of("token_logprob", {"A": 7, "D": 5, "V": 11}), [])
    assert "relative difference" in refused["wrong"]
    assert all(set(variants) == {"eager", "torch.compile"} for variants in works.values())


def test_what_cannot_run_is_refused_with_its_reason(no_compiler):
    works, refused = kernels_variants.lineup(case_of("token_logprob", {"A": 7, "D": 5, "V": 11}), ["native"])
    assert "native is no backend of it" in refused["native"]
    assert "native" not in works["forward"]
    assert refused["cut-cross-entropy"] == "cut-cross-entropy is not installed"


def test_interpreted_kernels_are_not_timed(no_compiler, monkeypatch):
    from fastlatent_kernels import triton_support

    monkeypatch.setattr(triton_support, "INTERPRETED", True)
    _, refused = kernels_variants.lineup(case_of("hrpo_gate", {"T": 3, "D": 4}), ["triton"])
    assert refused["triton"].startswith("interpreted")


# ---- the clock ------------------------------------------------------------------------------------------------------


def test_rounds_are_interleaved_from_cold_caches_and_preparation_is_not_timed():
    calls = []
    works = {name: Work(lambda state, name=name: calls.append(f"{name}{state}"), lambda: sleep(0.02) or "!")
             for name in "ab"}
    laps = kernels_clock.interleave(works, 3, lambda: calls.append("flush"))
    assert [call for call in calls if call != "flush"] == ["a!", "b!", "b!", "a!", "a!", "b!"]
    assert calls[::2] == ["flush"] * 6
    assert all(len(seconds) == 3 and max(seconds) < 0.02 for seconds in laps.values())


def test_a_lap_lasts_as_long_as_its_work():
    (seconds,) = kernels_clock.interleave({"a": Work(lambda _: sleep(0.05))}, 1, lambda: None)["a"]
    assert 0.05 <= seconds < 0.5


def test_the_flushed_buffer_is_larger_than_the_cache(monkeypatch, tmp_path):
    (tmp_path / "size").write_text("3072K\n")
    monkeypatch.setattr(kernels_clock, "CPU_CACHE", tmp_path / "size")
    assert kernels_clock.flusher("cpu")().nbytes == 2 * 3 * 2**20


def test_rounds_on_a_cpu_follow_from_the_seconds():
    assert [kernels_clock.rounds_within(8, s) for s in (100.0, 1.0, 1e-5)] == [5, 8, 50]


def test_ratios_are_those_within_a_round():
    laps = {"eager": [2.0, 8.0], "torch.compile": [1.0, 2.0], "triton": [1.0, 1.0]}
    got = kernels_bench.samples_of(laps, "triton", 0.5)
    assert got["speed_over_eager"] == [2.0, 8.0] and got["speed_over_compile"] == [1.0, 2.0]
    assert got["roofline_share"] == [0.5, 0.5]
    assert "speed_over_eager" not in kernels_bench.samples_of(laps, "eager", 0.5)


def test_a_floor_is_the_slower_of_copying_and_multiplying():
    limits = Ceilings(4e12, 8e14, "")
    assert limits.floor_s(4 * 10**9, 0) == pytest.approx(1e-3)
    assert limits.floor_s(4 * 10**9, 8 * 10**12) == pytest.approx(1e-2)


# ---- what becomes of the lines --------------------------------------------------------------------------------------


LINE = {"bench": "kernels", "case": "hrpo_gate T=64 D=576 bfloat16 both", "variant": "triton",
        "metrics": {"wall_s": 2e-5, "roofline_share": 0.85, "speed_over_eager": 4.0, "speed_over_compile": 1.3,
                    "peak_bytes": 2.0**20},
        "spread": {"wall_s": [1e-5, 3e-5], "speed_over_eager": [3.5, 4.5], "speed_over_compile": [1.2, 1.4]},
        "facts": {"model": "qwen2.5-1.5b", "gb_s": 3655.4, "tflop_s": None, "is_headline": True},
        "git": {"commit": "0123456789", "dirty": False}, "hardware": {"cpu": "c", "cores": 2, "gpus": ["Some GPU"]},
        "versions": {"torch": "9.9", "transformers": "8.8"}, "threads": {"torch": 2},
        "time": "2026-11-20T10:00:00+00:00"}


def test_the_readme_shows_headlines_beside_eager_and_compiled():
    others = [LINE | {"variant": variant} for variant in ("eager", "torch.compile")]
    others.append(LINE | {"case": "hrpo_gate small", "facts": LINE["facts"] | {"is_headline": False}})
    text = readme.generated([LINE, *others])
    rows = [line for line in text.splitlines() if line.startswith("| hrpo_gate")]
    assert [row.split(" | ")[1:] for row in rows] == [
        ["triton", "20 (10 to 30)", "3655", "85%", "4.00 (3.50 to 4.50)", "1.30 (1.20 to 1.40)", "1", "0123456 |"]]


def test_compare_marks_a_kernel_that_got_slower_and_a_share_that_fell(tmp_path, capsys):
    machine = {name: LINE[name] for name in ("git", "hardware", "versions", "threads", "time")}
    for name, seconds in (("a", 1e-5), ("b", 1.2e-5)):
        samples = kernels_bench.samples_of({"triton": [seconds]}, "triton", 8e-6)
        line = results.Result(bench="kernels", case=LINE["case"], variant="triton", samples=samples)
        results.append([line], machine, tmp_path / name)
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ["worse", "worse"]
