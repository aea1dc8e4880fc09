import sys
import time
from types import SimpleNamespace

import pytest
import torch

import benches.span
from benches import results
from fastlatent import profiling
from fastlatent.errors import UserError
from fastlatent.profiling import apart, reset_timings, span, timings


@pytest.fixture(autouse=True)
def fresh():
    reset_timings()
    yield
    reset_timings()


class Ranges:
    def __init__(self):
        self.open, self.seen, self.counts = [], [], []

    def push(self, name, tokens):
        self.open.append(name)
        self.seen.append("/".join(self.open))
        self.counts.append((name, tokens))

    def count(self, tokens):
        self.counts.append((f"in {self.open[-1]}", tokens))

    def pop(self):
        self.open.pop()


def test_a_span_measures_its_block_and_adds_up():
    expected = 0.0
    for _ in range(3):
        start = time.perf_counter()
        with span("evaluate"):
            time.sleep(0.01)
        expected += time.perf_counter() - start
    assert 0.03 <= timings()["evaluate"] <= expected
    assert expected - timings()["evaluate"] < 0.01
    reset_timings()
    assert timings() == {}


def test_an_outer_span_holds_its_inner_ones():
    with span("update"):
        with span("update/forward"):
            time.sleep(0.005)
        with span("update/backward"):
            time.sleep(0.005)
    seconds = timings()
    assert seconds["update"] >= seconds["update/forward"] + seconds["update/backward"] >= 0.01


def test_an_exception_closes_every_range_and_travels_on(monkeypatch):
    ranges = Ranges()
    monkeypatch.setattr(profiling, "_ranges", ranges)
    with pytest.raises(ZeroDivisionError):
        with span("update"):
            with span("update/head"):
                1 / 0
    assert ranges.open == [] and ranges.seen == ["update", "update/update/head"]
    assert set(timings()) == {"update", "update/head"}


def test_a_name_outside_the_table_is_an_error():
    with pytest.raises(KeyError, match="is not a span"):
        with span("lunch"):
            pass


def test_torch_profiler_shows_the_span_with_what_ran_in_it():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with span("update/forward"):
            torch.ones(4).cumsum(0)
    events = {event.name: event for event in profile.events()}
    assert events["aten::cumsum"].cpu_parent is events["update/forward"]


def test_counts_of_tokens_reach_the_profilers(monkeypatch):
    ranges = Ranges()
    monkeypatch.setattr(profiling, "_ranges", ranges)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with span("rollout") as drawing:
            drawing.tokens = 7
        with span("update/microbatch", tokens=5):
            pass
        with span("evaluate"):
            pass
    assert ranges.counts == [
        ("rollout", None), ("in rollout", 7), ("update/microbatch", 5), ("in update/microbatch", 5), ("evaluate", None)]
    events = {event.name: event for event in profile.events()}
    assert events["tokens=7"].cpu_parent is events["rollout"]
    assert events["tokens=5"].cpu_parent is events["update/microbatch"]
    assert sum(name.startswith("tokens") for name in events) == 2


def test_a_watcher_is_told_before_any_profiler_and_after_all_of_them(monkeypatch):
    told = []

    class Watcher(Ranges):
        def entered(self, name):
            told.append(("entered", name))

        def left(self, name):
            told.append(("left", name))

        def push(self, name, tokens):
            told.append(("push", name))

        def pop(self):
            told.append(("pop",))

    watcher = Watcher()
    monkeypatch.setattr(profiling, "_ranges", watcher)
    profiling.watch(watcher)
    try:
        with pytest.raises(ZeroDivisionError):
            with span("rollout"):
                1 / 0
    finally:
        profiling.watch(None)
    with span("evaluate"):
        pass
    assert told == [("entered", "rollout"), ("push", "rollout"), ("pop",), ("left", "rollout"), ("push", "evaluate"), ("pop",)]


def test_a_span_neither_breaks_nor_times_a_compiled_region():
    def double(x):
        with span("rollout/decode"):
            return x * 2

    compiled = torch.compile(double, fullgraph=True, backend="eager")
    assert compiled(torch.ones(2)).tolist() == [2, 2]
    assert timings() == {}
    double(torch.ones(2))
    assert set(timings()) == {"rollout/decode"}


def test_what_begins_while_a_span_is_open_ends_with_its_own_ranges():
    """A profiler that starts or stops in the middle sees whole ranges only."""
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with span("step"):
        profile.start()
        with span("update"):
            pass
        with span("score_old"):
            profile.stop()
    with span("rollout"):
        pass
    assert set(timings()) == {"step", "update", "score_old", "rollout"}
    names = {event.name for event in profile.events()}
    assert "update" in names and "rollout" not in names
    assert "step" not in {event.name for event in profile.events()}


def test_spans_apart_are_seen_and_not_counted(monkeypatch):
    ranges = Ranges()
    with span("update/forward"):
        pass
    before = timings()
    for is_shown in (False, True):
        if is_shown:
            monkeypatch.setattr(profiling, "_ranges", ranges)
        with pytest.raises(ZeroDivisionError):
            with span("score_old"), apart():
                with span("update/forward"):
                    1 / 0
        assert timings().pop("update/forward") == before["update/forward"]
    assert timings()["score_old"] > 0 and ranges.seen == ["score_old", "score_old/update/forward"]
    with span("update/forward"):
        pass
    assert timings()["update/forward"] > before["update/forward"]


def test_the_cost_of_a_span_is_measured_idle_and_under_a_profiler(tmp_path, capsys):
    benches.span.main(["--rounds", "2", "--out", str(tmp_path / "lines.jsonl")])
    idle, recorded = results.read(tmp_path / "lines.jsonl")
    assert (idle["variant"], recorded["variant"]) == ("idle", "torch.profiler")
    assert idle["metrics"]["wall_s"] > 0 and recorded["metrics"]["wall_s"] > 0
    assert capsys.readouterr().out.startswith("idle ") and not torch.autograd._profiler_enabled()
    with pytest.raises(UserError, match="--rounds: wanted 1 or more, got 0"):
        benches.span.main(["--rounds", "0"])


class Domain:
    """A domain of the nvtx package (0.2.17) while a tool listens; its events are written down."""

    def __init__(self):
        self.events = []
        self.pop_range = lambda: self.events.append("pop")

    def get_event_attributes(self, message=None, color=None, category=None, payload=None):
        return message, payload

    def push_range(self, attributes):
        self.events.append(("push", *attributes))

    def mark(self, attributes):
        self.events.append(("mark", *attributes))


@pytest.mark.parametrize("listens", [False, True])
def test_nvtx_ranges_have_a_domain_of_their_own_and_counts_as_payloads(monkeypatch, listens):
    domain, asked_for = Domain(), []

    def get_domain(name):
        asked_for.append(name)
        return domain if listens else object()  # the package's own stand-in where no tool listens

    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(Domain=Domain, get_domain=get_domain))
    monkeypatch.setattr(profiling, "_ranges", profiling._nvtx_ranges())
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            with span("rollout", tokens=80), span("rollout/decode") as drawing:
                drawing.tokens = 7
                1 / 0
    once = [("push", "rollout", 80), ("push", "rollout/decode", None), ("mark", "tokens", 7), "pop",
            ("mark", "tokens", 80), "pop"]
    assert asked_for == ["fastlatent"] and domain.events == (2 * once if listens else [])


@pytest.mark.parametrize("has_cuda", [False, True])
def test_an_nvtx_package_that_is_too_old_is_as_good_as_none(monkeypatch, has_cuda):
    monkeypatch.setattr(profiling, "_HAS_CUDA", has_cuda)
    for old in (None, SimpleNamespace(), SimpleNamespace(get_domain=lambda name: Domain())):  # absent, 0.2.10, 0.2.11
        monkeypatch.setitem(sys.modules, "nvtx", old)
        assert isinstance(profiling._nvtx_ranges(), profiling._TorchNvtx if has_cuda else type(None))


class FakeDevice:
    """A stream of work with its own clock, in place of CUDA."""

    def __init__(self, monkeypatch):
        self.now_ms, self.num_waits, self.is_capturing = 0.0, 0, False
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at_ms = device.now_ms

            def synchronize(self):
                device.num_waits += 1

            def elapsed_time(self, other):
                return other.at_ms - self.at_ms

        monkeypatch.setattr(profiling, "_HAS_CUDA", True)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.is_capturing)
        monkeypatch.setattr(torch.cuda, "Event", Event)


def test_on_a_device_nobody_waits_before_the_times_are_read(monkeypatch):
    device = FakeDevice(monkeypatch)
    for _ in range(2):
        with span("step"):
            device.now_ms += 1
            with span("update"):
                device.now_ms += 250
    assert device.num_waits == 0
    assert timings() == {"step": 0.502, "update": 0.5}
    assert device.num_waits == 4
    assert timings() == {"step": 0.502, "update": 0.5}
    with span("score_old"), apart():
        with span("update"):
            device.now_ms += 3
    assert timings() == {"step": 0.502, "update": 0.5, "score_old": 0.003}


def test_a_device_that_fails_leaves_no_range_open(monkeypatch):
    """After an error of CUDA its events cannot be recorded either."""
    def fail():
        raise RuntimeError("CUDA error: device-side assert triggered")

    ranges = Ranges()
    FakeDevice(monkeypatch)
    monkeypatch.setattr(profiling, "_ranges", ranges)
    with pytest.raises(RuntimeError, match="device-side assert"):
        with span("update"), span("update/backward"):
            monkeypatch.setattr(profiling, "_mark", fail)
    assert ranges.seen == ["update", "update/update/backward"] and ranges.open == []


def test_inside_a_graph_capture_a_span_does_nothing(monkeypatch):
    device, ranges = FakeDevice(monkeypatch), Ranges()
    monkeypatch.setattr(profiling, "_ranges", ranges)
    device.is_capturing = True
    with span("rollout/decode"):
        device.now_ms += 5
    assert timings() == {} and ranges.seen == []


def test_a_torch_built_with_cuda_times_spans_where_there_is_no_gpu(monkeypatch):
    """What `pip install torch` brings to a laptop: there `cudaGetDevice` fails, and so does all that asks for a stream."""
    def refuse(*_):
        raise RuntimeError("CUDA error: CUDA driver version is insufficient for CUDA runtime version")

    monkeypatch.setattr(profiling, "_HAS_CUDA", True)
    for name in ("is_current_stream_capturing", "current_stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    with span("update"):
        time.sleep(0.005)
    assert 0.005 <= timings()["update"] < 1


@pytest.mark.gpu
def test_cuda_time_is_the_streams_and_capture_leaves_no_range():
    x = torch.ones(64, device="cuda")
    torch.cuda.synchronize()
    with span("update/forward"):
        torch.cuda._sleep(200_000_000)
    host = time.perf_counter()
    assert timings()["update/forward"] > 0.02
    assert time.perf_counter() - host > 0.01  # it was the reading that waited
    reset_timings()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with span("rollout/decode"):
            x += 1
    graph.replay()
    assert timings() == {} and x[0].item() == 2
