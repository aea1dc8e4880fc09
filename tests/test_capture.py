"""Steps of a run are recorded, and nothing of the run is changed by it; what a GPU's own profilers need is asked for."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import tiny
import torch
from torch.profiler import ProfilerActivity

from fastlatent import profiling, train
from fastlatent.cli import run_command
from fastlatent.config import load_config
from fastlatent.errors import UserError
from fastlatent.log import read
from fastlatent.metrics import SPANS, is_reproducible, phase_seconds
from fastlatent.profiling import capture, span
from fastlatent.profiling.capture import Capture
from fastlatent.profiling.readers import open_text, read_chrome
from fastlatent.profiling.timeline import rows_of
from fastlatent.runfolder import first_difference
from fastlatent.trainer import Trainer

WORDS = [
    "hrpo_quickstart", "data.name=jsonl", "data.train=rows.jsonl", "data.held_out_size=4", "num_prompts=2",
    "group_size=4", "sampling.max_new_tokens=12", "thinking.max_tokens=4", "answer.max_tokens=3", "optim.lr=1e-3",
    "objective.num_epochs=2", "eval.num_prompts=2", "eval.every=2", "eval.ablations=false", "checkpoint.every=2", "num_steps=3",
    "log.live=plain", "model.path=model", "rewards=[{name: checksum.checksum}]"]
PARTS = {
    "step": ("rollout", "score_old", "update"),
    "rollout": ("rollout/weight_sync", "rollout/prefill", "rollout/decode", "rollout/reward"),
    "rollout/decode": ("rollout/sample",), "update": ("update/microbatch", "update/optimizer"),
    "update/microbatch": ("update/forward", "update/head", "update/backward")}
"""What lies in what, side by side."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.working_folder(tmp_path_factory.mktemp("capture"))


@pytest.fixture
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr("fastlatent.trainer.write_report", lambda run: None)  # seconds of drawing, not the subject here
    for name in capture.NSIGHT:
        monkeypatch.delenv(name, raising=False)


def metrics_of(path) -> list[dict]:
    return [{name: value for name, value in row.items() if is_reproducible(name)} for row in read(path / "metrics.jsonl")]


def timeline_of(path):
    return read_chrome(path, json.loads(open_text(path)))


# ---- a run on a CPU -------------------------------------------------------------------------------------------------


def test_a_recorded_run_leaves_the_tree_of_its_steps_and_is_otherwise_the_same(inside, capsys):
    plain = Trainer(load_config(*WORDS, "out=plain")).run()
    capsys.readouterr()
    path = Trainer(load_config(*WORDS, "out=recorded", "profile.steps=1:2")).run()
    out = capsys.readouterr().out
    assert metrics_of(path) == metrics_of(plain)
    (trace,) = (path / "profile").iterdir()
    assert trace.name == "steps-1-2.json.gz"
    assert f"python -m fastlatent.profile_report {trace}" in out and "no memory snapshot, because" in out

    rows = rows_of(timeline_of(trace))
    tree = [(row.depth, row.name) for row in rows]
    assert tree == [
        (0, "step"),
        (1, "rollout"), (2, "rollout/prefill"), (2, "rollout/decode"), (3, "rollout/sample"), (2, "rollout/reward"),
        (2, "rollout/weight_sync"),  # of the second step alone: the engine drew for an evaluation before the first
        (1, "score_old"), (2, "update/forward"), (2, "update/head"),
        (1, "update"), (2, "update/microbatch"), (3, "update/forward"), (3, "update/head"), (3, "update/backward"),
        (2, "update/optimizer"),
        # after the second step
        (0, "evaluate"), (1, "rollout/weight_sync"), (1, "rollout/prefill"), (1, "rollout/decode"), (2, "rollout/sample"),
        (0, "checkpoint")]
    first = [r.name for r in timeline_of(trace).ranges]
    second = first[first.index("step", 1) :]
    assert second[:4] == ["step", "rollout", "rollout/weight_sync", "rollout/prefill"]  # of these weights, before they draw
    by_path = {(row.depth, row.name): row for row in rows}
    logged = [row for row in read(path / "metrics.jsonl") if "time/step" in row][:2]
    # the forward passes of scoring, half as many, are no part of the update's
    forward_s = sum(line["time/update/forward"] for line in logged)
    assert forward_s == pytest.approx(by_path[3, "update/forward"].host_s, rel=0.2)
    for name in ("step", "rollout"):
        row = by_path[int(name != "step"), name]
        assert row.count == 2
        assert row.tokens == sum(line["num_tokens"] for line in logged)
        # two clocks
        assert row.host_s == pytest.approx(sum(line[f"time/{name}"] for line in logged), rel=0.1)
    assert by_path[1, "score_old"].tokens == by_path[2, "update/microbatch"].tokens / 2  # of two epochs
    assert by_path[2, "rollout/decode"].tokens == by_path[1, "rollout"].tokens
    for line in logged:
        times = {name.removeprefix("time/"): seconds for name, seconds in line.items() if name.startswith("time/")}
        assert times.keys() <= {name for _, name in tree}
        assert sum(phase_seconds(line).values()) < times["step"] and min(phase_seconds(line).values()) > 0
        for whole in ("step", "rollout", "rollout/decode", "update", "update/microbatch"):
            assert sum(times.get(part, 0.0) for part in PARTS[whole]) <= times[whole], whole
    assert by_path[1, "update"].tokens == by_path[2, "update/microbatch"].tokens > 0
    forward = by_path[3, "update/forward"]
    assert forward.own_s and 0 < forward.busy_s <= forward.host_s


def test_with_ranges_each_time_one_is_entered_is_recorded_by_itself(inside, capsys):
    words = [*WORDS, "out=ranges", "profile.steps=3", "profile.ranges=rollout,update/optimizer,rollout/decode"]
    path = Trainer(load_config(*words)).run()
    traces = sorted((path / "profile").iterdir())
    # the evaluation's decoding, what was asked for twice once, and two passes over the step's data
    assert {trace.name.removesuffix(".json.gz"): [row.name for row in rows_of(timeline_of(trace))] for trace in traces} == {
        "step-3-rollout": ["rollout", "rollout/prefill", "rollout/decode", "rollout/sample", "rollout/reward"],
        "step-3-rollout-decode": ["rollout/decode", "rollout/sample"],
        "step-3-update-optimizer": ["update/optimizer"], "step-3-update-optimizer-2": ["update/optimizer"]}
    assert capsys.readouterr().out.count("no memory snapshot") == 1
    assert profiling._watcher is None


def test_a_run_that_goes_on_may_be_recorded_and_a_window_that_is_over_is_told(inside, capsys):
    words = [*WORDS, "out=over", "checkpoint.every=1", "num_steps=2", "eval.every=0"]
    Trainer(load_config(*words)).run()
    assert first_difference({"profile": {"steps": "1"}}, {"profile": {"steps": None}}) is None
    capsys.readouterr()
    path = Trainer(load_config(*words, "resume=auto", "profile.steps=1:2")).run()
    assert "profile: nothing was recorded: steps 1 to 2 were not trained here" in capsys.readouterr().out
    assert not (path / "profile").exists()


def test_what_was_recorded_before_an_exception_is_written(inside, tmp_path):
    said = []
    with pytest.raises(ZeroDivisionError):
        with Capture(load_config(*WORDS, "profile.steps=1:3"), tmp_path, said.append) as recording:
            with recording.step(1), span("step"):
                torch.ones(3).cumsum(0)
            with recording.step(2), span("step"):
                1 / 0
    assert [row.count for row in rows_of(timeline_of(tmp_path / "profile" / "steps-1-2.json.gz"))] == [2]
    assert len(said) == 2


def test_nothing_is_recorded_unless_asked_for(inside, tmp_path):
    for words in ([], ["profile.steps=1:3", "profile.tool=none"]):
        with Capture(load_config(*WORDS, *words), tmp_path, pytest.fail) as recording:
            for step in (1, 2, 3):
                with recording.step(step):
                    assert not torch.autograd._profiler_enabled() and profiling._watcher is None
    assert list(tmp_path.iterdir()) == []


class CudaMemory:
    """What torch.cuda says of its allocator while its history is kept."""

    def __init__(self, monkeypatch):
        self.calls, self.is_kept = [], False
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.calls.append("synchronize"))
        monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", self.keep)
        monkeypatch.setattr(torch.cuda.memory, "_snapshot", self.snapshot)

    def keep(self, enabled="all", stacks="all", max_entries=None):
        assert not enabled or stacks == "python"  # those of C++ are several times as large
        self.is_kept = enabled is not None
        self.calls.append(("keep", max_entries) if self.is_kept else "forget")

    def snapshot(self):
        assert self.is_kept
        frames = [{"filename": "trainer.py", "line": 7, "name": "_learn"}]
        return {"segments": [{"address": 140000000000000, "total_size": 2097152, "segment_pool_id": (0, 1), "frames": [],
                              "blocks": [{"size": 512, "state": "active_allocated", "frames": frames}]}],
                "device_traces": [[{"action": "alloc", "size": 512, "stream": 0, "frames": frames}]],
                "allocator_settings": {"garbage_collection_threshold": 0.0}, "external": {torch.float32}}


def test_the_memory_snapshot_is_json_of_the_steps_alone(inside, monkeypatch, tmp_path):
    memory, said = CudaMemory(monkeypatch), []
    profile, asked_for = torch.profiler.profile, []

    def of_cpu(activities):
        asked_for.extend(activities)
        return profile(activities=[ProfilerActivity.CPU])

    monkeypatch.setattr(torch.profiler, "profile", of_cpu)
    config = load_config(*WORDS, "profile.steps=2")
    with Capture(config, tmp_path, said.append) as recording:
        for number in (1, 2, 3):
            with recording.step(number), span("step"):
                memory.calls.append(number)
    assert asked_for == [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    assert memory.calls == [1, "synchronize", ("keep", capture.MAX_ALLOCATIONS), 2, "forget", 3]
    path = tmp_path / "profile" / "step-2-memory.json"
    assert said[-1] == f"profile: wrote {path}"
    found = json.loads(path.read_text())
    assert found["segments"][0]["blocks"][0]["frames"] == [{"filename": "trainer.py", "line": 7, "name": "_learn"}]
    assert found["segments"][0]["address"] == 140000000000000 and found["device_traces"][0][0]["action"] == "alloc"
    assert {file.name for file in (tmp_path / "profile").iterdir()} == {"step-2.json.gz", "step-2-memory.json"}


# ---- Nsight ---------------------------------------------------------------------------------------------------------


def test_nsight_is_switched_on_around_the_steps_or_the_ranges(inside, monkeypatch, tmp_path):
    calls, said = [], []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("stop"))
    for ranges in ("", "rollout"):
        config = load_config(*WORDS, "num_steps=9", "profile.steps=3:4", "profile.tool=nsys", f"profile.ranges={ranges}")
        with Capture(config, tmp_path, said.append) as recording:
            for number in range(1, 6):
                with recording.step(number):
                    calls.append(number)
                    with span("rollout"):
                        calls.append("rollout")
    whole, parts = calls[: len(calls) // 2 - 1], calls[len(calls) // 2 - 1 :]
    assert whole == [1, "rollout", 2, "rollout", "start", 3, "rollout", 4, "rollout", "stop", 5, "rollout"]
    assert parts == [1, "rollout", 2, "rollout", 3, "start", "rollout", "stop", 4, "start", "rollout", "stop", 5, "rollout"]
    assert len(said) == 3 and "report: nsys export --type sqlite hrpo_quickstart-steps-3-4.nsys-rep; then" in said[0]
    for report in ("hrpo_quickstart-steps-3-4.1", "hrpo_quickstart-steps-3-4.2"):
        (tmp_path / f"{report}.nsys-rep").touch()
    (tmp_path / "nsys").write_text('#!/bin/sh\n[ $# = 4 ] && echo "$@"\n')  # an export takes one report
    (tmp_path / "nsys").chmod(0o755)
    for sentence in said[1:]:
        command = re.search(r"its report: (for .*; done); then", sentence)[1]
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        exported = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True).stdout
        assert exported.splitlines() == [f"export --type sqlite hrpo_quickstart-steps-3-4.{n}.nsys-rep" for n in (1, 2)]


def asked(*words: str):
    return load_config(*WORDS, *words)


def test_the_command_that_is_told_starts_this_very_run(inside):
    words = [*WORDS, "profile.steps=2:3", "profile.tool=nsys"]
    told = shlex.split(capture.command(load_config(*words), words))
    split = told.index(sys.executable)
    assert told[split:] == [sys.executable, "-m", "fastlatent.train", *words]
    assert told[:split] == [
        "nsys", "profile", "--trace=cuda,nvtx,osrt,cublas", "--capture-range=cudaProfilerApi", "--capture-range-end=stop",
        "--cuda-graph-trace=node", "--force-overwrite=true", "--output=hrpo_quickstart-steps-2-3"]
    assert "--capture-range-end=repeat" in capture.command(load_config(*words, "profile.ranges=rollout"), words)
    imitated = load_config(*words, "sft={}")
    assert shlex.split(capture.command(imitated, words))[split:] == [sys.executable, "-m", "fastlatent.sft", *words]
    ncu = shlex.split(capture.command(load_config(*words, "profile.tool=ncu"), words))
    assert ncu[: ncu.index(sys.executable)] == [
        "ncu", "--profile-from-start", "off", "--nvtx", "--force-overwrite", "--export", "hrpo_quickstart-steps-2-3"]


def test_nsight_has_to_have_started_the_run(inside, monkeypatch):
    config = asked("profile.steps=1", "profile.tool=nsys")
    with pytest.raises(UserError, match="records what a GPU does"):
        capture.check(config, WORDS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"has to start this process \(and nsys is not on the PATH\): nsys profile .*"
                                        "fastlatent.train"):
        capture.check(config, WORDS)
    monkeypatch.setenv("NSYS_PROFILING_SESSION_ID", "1")
    capture.check(config, WORDS)
    with pytest.raises(UserError, match="torch cannot record while Nsight does"):
        capture.check(asked("profile.steps=1"), WORDS)
    capture.check(asked(), WORDS)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, said", [
    (["profile.steps=2:4"], "profile.steps: wanted FIRST:LAST within 1:3, the steps of this run, got '2:4'"),
    (["profile.steps=0:2"], "profile.steps: wanted FIRST:LAST within 1:3"),
    (["profile.steps=3:2"], "profile.steps: wanted FIRST:LAST within 1:3"),
    (["profile.steps=two"], "profile.steps: wanted FIRST:LAST or one step, got 'two'"),
    (["profile.steps=1:2:3"], "profile.steps: wanted FIRST:LAST or one step, got '1:2:3'"),
    (["profile.steps=1", "profile.ranges=rolout"], "profile.ranges: 'rolout' is not one of .*; did you mean 'rollout'"),
    (["profile.ranges=rollout"], "profile.ranges: needs profile.steps"),
    (["profile.steps=1", "profile.tool=nsight"], "profile.tool: 'nsight' is not one of torch, nsys, ncu, none")])
def test_bad_input_is_one_sentence_before_anything_is_loaded(inside, words, said):
    with pytest.raises(UserError, match=said):
        asked(*words)


def test_bad_input_ends_the_command_with_exit_code_2(inside, capsys):
    for words in (["profile.steps=2:4"], ["profile.steps=1", "profile.tool=nsys"]):
        with pytest.raises(SystemExit) as exit_:
            run_command(train.main, [*WORDS, "out=never", *words])
        error = capsys.readouterr().err
        assert exit_.value.code == 2 and error.startswith("error: profile.") and len(error.splitlines()) == 1


def test_a_window_is_written_as_on_a_clock_and_stays_text(inside):
    """yaml would read 1:03 or 2:3 as minutes and seconds."""
    assert asked("profile.steps=2:3").profile.window == range(2, 4)
    assert asked("num_steps=99", "profile.steps=10:12").profile.window == range(10, 13)
    assert asked("profile.steps=2").profile.window == range(2, 3)
    assert asked("profile.steps=1", "profile.ranges=rollout, update").profile.spans == ("rollout", "update")
    assert {"rollout", "update"} <= set(SPANS)
