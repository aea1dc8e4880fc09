"""The measurement that the automatic choice of a backend follows: what it times, and how it is written."""

import json

import pytest
import torch
from fastlatent_kernels import OPS, measured

from benches import kernels_choice
from fastlatent.errors import UserError


def line(op="soft_embedding", backend="native", device="cpu", rows=1, speed=2.0, machine="new"):
    return {"op": op, "backend": backend, "device": device, "direction": "forward", "dtype": "float32", "rows": rows,
            "speed": speed, "machine": machine}


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "FILE", tmp_path / "measured.json")
    measured.FILE.write_text("[]")
    return measured.FILE


def test_new_lines_replace_those_of_their_op_backend_and_device_and_no_others(file):
    old = [line(machine="old", rows=8), line(machine="old", rows=64), line(machine="old", device="cuda"),
           line(machine="old", op="hrpo_gate")]
    kernels_choice.write(old)
    kernels_choice.write([line(rows=512, speed=3.0), line(rows=1, speed=0.5)])
    rows = json.loads(file.read_text())
    assert [(row["op"], row["device"], row["rows"], row["machine"]) for row in rows] == [
        ("hrpo_gate", "cpu", 1, "old"), ("soft_embedding", "cpu", 1, "new"), ("soft_embedding", "cpu", 512, "new"),
        ("soft_embedding", "cuda", 1, "old")]
    assert len(file.read_text().splitlines()) == len(rows) + 2  # a line each, for the eye and for git
    assert measured.table(rows)["soft_embedding"]["native", "cpu"].points == {
        ("forward", "float32"): ((1, 0.5), (512, 3.0))}


def test_every_backend_that_can_run_is_measured_at_each_number_of_rows(file, monkeypatch):
    monkeypatch.setattr(kernels_choice, "ROWS", (1, 3))
    small = {"soft_embedding": {"K": 5, "V": 33, "D": 65}, "group_advantage": {"G": 4}}
    letter = {"soft_embedding": "N", "group_advantage": "S"}
    monkeypatch.setattr(kernels_choice, "shapes", lambda op, rows: [{letter[op.name]: rows} | small[op.name]])
    monkeypatch.setattr(kernels_choice, "flusher", lambda device: lambda: None)
    torch.manual_seed(0)
    kernels_choice.main(["--op", "soft_embedding", "--op", "group_advantage", "--seconds", "0.001"])
    rows = json.loads(file.read_text())
    assert [(row["op"], row["backend"], row["direction"], row["dtype"], row["rows"]) for row in rows] == [
        ("soft_embedding", "native", direction, dtype, rows) for direction in ("both", "forward")
        for dtype in ("bfloat16", "float32") for rows in (1, 3)]
    # of the other op a CPU has the reference alone
    assert all(row["speed"] > 0 and row["machine"] for row in rows)


def test_a_line_keeps_the_slowest_shape(monkeypatch):
    answers = iter([2.0, 0.7, 3.0, 0.5, 1.0, 0.9, 4.0, 0.6])  # forward and both, in either type, at either shape
    monkeypatch.setattr(kernels_choice, "ROWS", (4,))
    monkeypatch.setattr(kernels_choice, "shapes", lambda op, rows: [{"T": rows, "D": 8}, {"T": rows, "D": 16}])
    monkeypatch.setattr(kernels_choice, "DIRECTIONS", ("forward", "both"))
    monkeypatch.setattr(kernels_choice, "speeds", lambda *arguments: {"native": next(answers)})
    found = kernels_choice.lines(OPS["hrpo_gate"], "cpu", 0.001)
    assert [(line["dtype"], line["direction"], line["rows"], line["speed"]) for line in found] == [
        ("float32", "forward", 4, 1.0), ("float32", "both", 4, 0.7), ("bfloat16", "forward", 4, 3.0),
        ("bfloat16", "both", 4, 0.5)]
    assert not list(answers)


def test_the_shapes_are_the_benchmark_s_with_so_many_rows():
    assert kernels_choice.shapes(OPS["vocab_head"], 8) == [
        {"B": 8, "D": 576, "V": 49152, "mixture": 0, "tied": 0}, {"B": 8, "D": 576, "V": 49152, "mixture": 1, "tied": 1}]
    assert kernels_choice.shapes(OPS["hrpo_gate_decode"], 1) == [{"B": 1, "D": 576, "V": 49152}]


def test_an_op_that_is_none_is_named():
    with pytest.raises(UserError, match="^--op: 'gate' is not one of clipped_surrogate, "):
        kernels_choice.main(["--op", "gate"])
