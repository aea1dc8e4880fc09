"""The numbers of a recording, worked out by hand, from each of the three kinds of file that hold one."""

import gzip
import json
import re
import sqlite3
from xml.etree import ElementTree

import pytest

from test_report import Page

from fastlatent import profile_report
from fastlatent.cli import run_command
from fastlatent.errors import UserError
from fastlatent.profiling.page import WIDTH, timeline_svg
from fastlatent.profiling.readers import read_chrome, read_nsys
from fastlatent.profiling.timeline import Range, Timeline, Work, rows_of, union

MAIN, OTHER = 7, 8
RANGES = [  # thread, name, start and end in ms, tokens; the rollout's count is known when it begins, the update's when it ends
    (MAIN, "step", 0, 100, None), (MAIN, "rollout", 0, 40, 80), (MAIN, "rollout/decode", 5, 39, None),
    (MAIN, "update", 40, 95, 330), (MAIN, "update/forward", 45, 60, None), (MAIN, "update/backward", 60, 80, None)]
KERNELS = [  # thread, name, asked, start, end; the fourth by autograd's own thread, the last after its span
    (MAIN, "gemm", 10, 12, 20), (MAIN, "gemm", 15, 20, 30), (MAIN, "softmax", 50, 70, 80), (OTHER, "gemm", 70, 85, 95)]
COPY = (MAIN, "memcpy", 30, 36, 38)
# name, depth, host, extent, busy, longest gap (ms), tokens
EXPECTED = [
    ("step", 0, 100, 83, 40, 32, None), ("rollout", 1, 40, 26, 20, 6, 80), ("rollout/decode", 2, 34, 26, 20, 6, None),
    ("update", 1, 55, 25, 20, 5, 330), ("update/forward", 2, 15, 10, 10, 0, None), ("update/backward", 2, 20, 10, 10, 0, None)]


def chrome(kernels=True, shift_us=5e9) -> dict:
    def event(category, name, thread, start, end, **args):
        return {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": thread, "ts": shift_us + start * 1e3,
                "dur": (end - start) * 1e3, "args": args}

    events = [{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}}]
    for thread, name, start, end, tokens in RANGES:
        events.append(event("user_annotation", name, thread, start, end))
        if tokens is not None:
            events.append(event("user_annotation", f"tokens={tokens}", thread, end - 0.01, end))
        events.append(event("gpu_user_annotation", name, 99, start + 1, end + 1))
    for number, (thread, name, asked, start, end) in enumerate([*KERNELS, COPY] if kernels else []):
        events.append(event("cuda_runtime", "cudaLaunchKernel", thread, asked, asked + 1, correlation=number))
        kind = "gpu_memcpy" if name == "memcpy" else "kernel"
        events.append(event(kind, name, 0, start, end, correlation=number))
    return {"schemaVersion": 1, "traceEvents": events[::-1]}


def nsys(path) -> None:
    """In the form of `nsys export --type sqlite`; another process uses the same correlation ids."""
    pid, other = 41 << 24, 42 << 24
    with sqlite3.connect(path) as database:
        database.executescript("""
            CREATE TABLE StringIds (id INTEGER PRIMARY KEY, value TEXT NOT NULL);
            CREATE TABLE NVTX_EVENTS (start INT NOT NULL, end INT, eventType INT NOT NULL, rangeId INT, category INT, color INT,
                text TEXT, globalTid INT, endGlobalTid INT, textId INT, domainId INT, uint64Value INT, int64Value INT,
                doubleValue REAL, uint32Value INT, int32Value INT, floatValue REAL, jsonTextId INT, jsonText TEXT,
                binaryData TEXT);
            CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INT NOT NULL, end INT NOT NULL, eventClass INT NOT NULL,
                globalTid INT, correlationId INT, nameId INT NOT NULL, returnValue INT NOT NULL, callchainId INT);
            CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INT NOT NULL, end INT NOT NULL, deviceId INT NOT NULL,
                contextId INT NOT NULL, streamId INT NOT NULL, correlationId INT, globalPid INT, demangledName INT NOT NULL,
                shortName INT NOT NULL, mangledName INT);
            CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (start INT NOT NULL, end INT NOT NULL, deviceId INT NOT NULL,
                contextId INT NOT NULL, streamId INT NOT NULL, correlationId INT, globalPid INT, bytes INT NOT NULL,
                copyKind INT NOT NULL);
        """)
        strings = {"gemm": 1, "softmax": 2, "cudaLaunchKernel": 3, "step": 4, "rollout/decode": 5}
        database.executemany("INSERT INTO StringIds VALUES (?, ?)", [(i, s) for s, i in strings.items()])

        def nvtx(kind, name, thread, start, end, payload=None):
            text, text_id = (None, strings[name]) if name in strings else (name, None)  # registered, or not
            database.execute(
                "INSERT INTO NVTX_EVENTS (start, end, eventType, text, globalTid, textId, domainId, int64Value)"
                " VALUES (?, ?, ?, ?, ?, ?, 1, ?)",
                (round(start * 1e6), None if end is None else round(end * 1e6), kind, text, thread, text_id, payload))

        nvtx(75, "fastlatent", pid | MAIN, 0, None)
        nvtx(59, "somebody else's", pid | MAIN, 0, 200)
        nvtx(60, "update", pid | MAIN, 0, 90)
        for thread, name, start, end, tokens in RANGES:
            is_known = name == "rollout"
            nvtx(59, name, pid | thread, start, end, tokens if is_known else None)
            if tokens is not None:
                nvtx(34, "tokens", pid | thread, end - 0.01, None, tokens)
        for number, (thread, name, asked, start, end) in enumerate([*KERNELS, COPY]):
            for process, at in ((pid | thread, asked), (other | 1, 1)):
                database.execute("INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, 0, ?, ?, 3, 0, NULL)",
                                 (at * 10**6, (at + 1) * 10**6, process, number))
            table = "MEMCPY" if name == "memcpy" else "KERNEL"
            what = (64, 1) if name == "memcpy" else (strings[name], strings[name], None)
            database.execute(f"INSERT INTO CUPTI_ACTIVITY_KIND_{table} VALUES (?, ?, 0, 1, 7, ?, ?{', ?' * len(what)})",
                             (start * 10**6, end * 10**6, number, pid, *what))


def in_ms(row) -> tuple:
    spans = (row.host_s, row.extent_s, row.busy_s, row.longest_gap_s)
    return (row.name, row.depth, *(None if s is None else pytest.approx(1e3 * s, abs=1e-6) for s in spans), row.tokens)


@pytest.fixture(params=["chrome", "nsys"])
def timeline(request, tmp_path) -> Timeline:
    if request.param == "chrome":
        return read_chrome(tmp_path / "x.json", chrome())
    nsys(tmp_path / "x.sqlite")
    return read_nsys(tmp_path / "x.sqlite")


def test_each_range_owns_what_was_asked_for_while_it_was_open(timeline):
    rows = rows_of(timeline)
    assert [in_ms(row) for row in rows] == EXPECTED
    by_name = {row.name: row for row in rows}
    assert by_name["rollout"].top(2) == [("gemm", pytest.approx(0.018)), ("memcpy", pytest.approx(0.002))]
    assert by_name["update/backward"].top(9) == [("gemm", pytest.approx(0.01))]
    assert by_name["rollout"].busy_share == pytest.approx(20 / 26)
    assert by_name["step"].gap_s == pytest.approx(0.043)
    assert by_name["rollout"].tokens_per_s == pytest.approx(2000)
    assert by_name["update"].tokens_per_s == pytest.approx(6000)


def test_a_graph_that_nsys_recorded_whole_is_work_like_a_kernel(tmp_path):
    """Without --cuda-graph-trace=node the kernels of a graph are in no table, and the graph is in one of its own."""
    path = tmp_path / "x.sqlite"
    nsys(path)
    pid = 41 << 24
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE CUPTI_ACTIVITY_KIND_GRAPH_TRACE (start INT, end INT, deviceId INT, contextId INT,"
                         " greenContextId INT, streamId INT, correlationId INT, globalPid INT, graphId INT, graphExecId INT)")
        database.execute(
            "INSERT INTO CUPTI_ACTIVITY_KIND_GRAPH_TRACE VALUES (31000000, 36000000, 0, 1, NULL, 7, 99, ?, 1, 2)", (pid,))
        database.execute(
            "INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (29000000, 29500000, 0, ?, 99, 3, 0, NULL)", (pid | MAIN,))
    decode = rows_of(read_nsys(path))[2]
    # 12 to 30, 31 to 36 and 36 to 38 ms
    assert in_ms(decode) == ("rollout/decode", 2, 34, 26, 25, 1, None)
    assert decode.own_s["CUDA graph"] == pytest.approx(0.005)


def test_kernels_of_several_streams_count_once_where_they_overlap():
    kernels = [("a", 10, 30, 1), ("b", 12, 15, 2), ("c", 28, 34, 3), ("d", 40, 44, 4), ("e", 42, 43, 5), ("a", 50, 52, 6)]
    work = [Work(name, start, end, asked, end - start) for name, start, end, asked in kernels]
    step, update = rows_of(Timeline.of(True, [Range("step", 0, 60), Range("update", 2, 6)], work))
    # busy: 10 to 34, 40 to 44, 50 to 52
    assert (step.extent_s, step.busy_s, step.gap_s, step.longest_gap_s) == (42, 30, 12, 6)
    # without the first, which was asked for before, and the last: 12 to 15, 28 to 34, 40 to 44
    assert (update.extent_s, update.busy_s, update.longest_gap_s) == (32, 13, 13)
    assert step.top(2) == [("a", 22), ("c", 6)]


def test_a_range_that_asked_for_nothing_has_no_extent():
    timeline = Timeline.of(True, [Range("step", 0, 9), Range("reward", 6, 8)], [Work("gemm", 3, 4, 1, 1)])
    reward = rows_of(timeline)[1]
    assert (reward.extent_s, reward.busy_s, reward.busy_share, reward.longest_gap_s) == (0, 0, None, 0)


def test_repeated_ranges_add_up_and_children_stay_below_their_parent():
    ranges = [Range("step", 0, 10), Range("rollout", 0, 4), Range("update", 4, 9), Range("step", 10, 20),
              Range("rollout", 10, 15), Range("rollout/prefill", 11, 12), Range("update", 15, 20)]
    rows = rows_of(Timeline.of(True, ranges, []))
    assert [(r.name, r.depth, r.count, r.host_s) for r in rows] == [
        ("step", 0, 2, 20), ("rollout", 1, 2, 9), ("rollout/prefill", 2, 1, 1), ("update", 1, 2, 10)]
    assert [(r.extent_s, r.busy_s, r.gap_s, r.tokens_per_s) for r in rows] == [(None,) * 4] * 4


def test_on_a_cpu_an_op_is_charged_for_its_own_time_and_the_rest_is_a_gap(tmp_path):
    trace = chrome(kernels=False, shift_us=0)
    for name, start, end in (("linear", 6, 16), ("addmm", 7, 13), ("copy", 8, 9), ("exp", 20, 25)):
        trace["traceEvents"].append(
            {"ph": "X", "cat": "cpu_op", "name": name, "pid": 1, "tid": MAIN, "ts": start * 1e3, "dur": (end - start) * 1e3})
    decode = rows_of(read_chrome(tmp_path / "x.json", trace))[2]
    # 5 to 39 ms: ops from 6 to 16 and from 20 to 25
    assert in_ms(decode) == ("rollout/decode", 2, 34, 34, 15, 14, None)
    assert {name: round(1e3 * s, 6) for name, s in decode.own_s.items()} == {"linear": 4, "addmm": 5, "copy": 1, "exp": 5}


def test_union_of_intervals():
    assert union([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    assert union([(0, 1), (1.5, 2)], gap_s=0.5) == [(0, 2)]
    assert union([]) == []


# ---- the command ----------------------------------------------------------------------------------------------------


def columns(out: str, name: str) -> list[str]:
    """Of the table's line about a range."""
    lines = [line.split() for line in out.split("\n\n")[0].splitlines()]
    return next(cells for first, *cells in lines if first == name)


@pytest.mark.parametrize("kind", ["json", "json.gz", "sqlite"])
def test_the_command_prints_the_numbers_and_writes_a_page(tmp_path, capsys, kind):
    path = tmp_path / f"steps-3-5.{kind}"
    if kind == "sqlite":
        nsys(path)
    else:
        text = json.dumps(chrome()).encode()
        path.write_bytes(gzip.compress(text) if kind == "json.gz" else text)
    profile_report.main([str(path)])
    out = capsys.readouterr().out
    assert columns(out, "rollout") == ["1", "0.04", "40.0%", "76.9%", "0.006", "6", "2000"]
    assert columns(out, "step") == ["1", "0.1", "100.0%", "48.2%", "0.043", "32"]
    assert "90.0%  gemm" in out and "10.0%  memcpy" in out
    written = tmp_path / "steps-3-5.profile.html"
    assert out.splitlines()[-1] == str(written)
    page = Page(written.read_text())
    assert {tag for tag, _ in page.elements} & {"script", "link", "iframe"} == set() and "http" not in written.read_text()
    assert "rollout/decode: 34 ms" in page.text and "rollout: 40 ms, 80 tokens" in page.text and "90.0%  gemm" in page.text


def test_the_timeline_is_to_scale_and_short_ranges_are_drawn_as_one(timeline):
    elements = Page(timeline_svg(timeline)).elements
    boxes = [(float(a["x"]), float(a["width"]), float(a["y"])) for tag, a in elements if tag == "rect"]
    scale = WIDTH / 0.1
    assert boxes[2] == (pytest.approx(0.040 * scale), pytest.approx(0.055 * scale), boxes[1][2])  # update, beside the rollout
    busy = [(x, width) for x, width, y in boxes if y == max(y for _, _, y in boxes)]
    assert busy == [(pytest.approx(a * scale), pytest.approx((b - a) * scale)) for a, b in
                    ((0.012, 0.030), (0.036, 0.038), (0.070, 0.080), (0.085, 0.095))]
    many = [Range("step", 0, 10)] + [Range("rollout/sample", i / 1e4, (i + 0.9) / 1e4) for i in range(100_000)]
    assert len(timeline_svg(Timeline.of(True, many, []))) < 2_000_000


@pytest.mark.parametrize("is_coarse", [False, True])
def test_the_figure_is_an_image_of_its_own_and_small(tmp_path, is_coarse):
    trace = chrome()
    if is_coarse:
        sample = next(e for e in trace["traceEvents"] if e["name"] == "rollout/decode")
        trace["traceEvents"] += [
            sample | {"name": "rollout/sample", "ts": sample["ts"] + 3 * i, "dur": 2.0} for i in range(10_000)]
    (tmp_path / "x.json").write_text(json.dumps(trace))
    figure = tmp_path / "figure.svg"
    profile_report.main([str(tmp_path / "x.json"), "--figure", str(figure)])
    root = ElementTree.fromstring(figure.read_text())  # what an image must be: well-formed, in its name space, and to scale
    svg = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{svg}svg" and root.get("viewBox").split()[2] == str(WIDTH)
    labels = [text.text for text in root.iter(f"{svg}text")]
    assert labels[:3] == ["step", "rollout", "update"] and {"forward", "rollout/decode", "0.1 s"} <= {*labels, "forward"}
    assert figure.stat().st_size < 150_000


def test_a_figure_is_refused_where_there_is_no_timeline_or_no_place(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time/step": 4.0}\n')
    (tmp_path / "x.json").write_text(json.dumps(chrome()))
    for file, figure, said in (
            ("metrics.jsonl", "a.svg", "holds sums of steps"), ("x.json", "a.png", "wanted a name that ends in .svg"),
            ("x.json", "nowhere/a.svg", "cannot write .*: No such file")):
        with pytest.raises(UserError, match=said):
            profile_report.main([str(tmp_path / file), "--figure", str(tmp_path / figure)])


def test_a_page_that_cannot_be_written_is_refused_after_its_numbers(tmp_path, capsys):
    (tmp_path / "x.json").write_text(json.dumps(chrome()))
    (tmp_path / "x.profile.html").mkdir()
    with pytest.raises(UserError, match="^FILE: cannot write .*x.profile.html: Is a directory$"):
        profile_report.main([str(tmp_path / "x.json")])
    assert capsys.readouterr().out.startswith("range ")


def test_names_from_a_file_are_text(tmp_path):
    trace = chrome()
    for event in trace["traceEvents"]:
        event["name"] = event["name"].replace("gemm", "<script>gemm</script>")
    path = tmp_path / "x.json"
    path.write_text(json.dumps(trace))
    profile_report.main([str(path)])
    assert "script" not in {tag for tag, _ in Page((tmp_path / "x.profile.html").read_text()).elements}


def test_metrics_of_a_run_have_times_and_tokens(tmp_path, capsys):
    rows = [{"step": 0, "eval/accuracy": 0.5, "time/evaluate": 3.0},
            {"step": 1, "reward": 0.1, "num_tokens": 100, "time/step": 4.0, "time/rollout": 2.0, "time/rollout/decode": 1.5,
             "time/update": 1.0, "time/score_old": 0.25},
            {"step": 2, "reward": 0.2, "num_tokens": 140, "time/step": 6.0, "time/rollout": 4.0, "time/rollout/decode": 3.0,
             "time/update": 2.0}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "rew')
    profile_report.main([str(path)])
    out = capsys.readouterr().out
    assert columns(out, "step") == ["2", "10", "100.0%", "24"]
    assert columns(out, "rollout") == ["2", "6", "60.0%", "40"]
    assert columns(out, "rollout/decode") == ["2", "4.5", "45.0%"] and columns(out, "evaluate") == ["1", "3", "30.0%"]
    assert [line.split()[0] for line in out.splitlines()[1:7]] == [
        "step", "rollout", "rollout/decode", "score_old", "update", "evaluate"]
    page = Page((tmp_path / "metrics.profile.html").read_text())
    assert "data:image/png" in dict(next(a for tag, a in page.elements if tag == "img").items())["src"]


FOREIGN = b'{"traceEvents": [{"ph": "X", "cat": "user_annotation", "name": "mine", "tid": 1, "ts": 0, "dur": 1}]}'


@pytest.mark.parametrize("content, said", [
    (None, "no such file"), (b"", "an empty file"), (b"hello\n", "neither a Chrome trace"),
    (b"[1, 2]", "neither a Chrome trace"), (b'{"a": 1}', "neither a Chrome trace"),
    (b'{"step": 1}\n', "no time/\\* metric"), (FOREIGN, "holds no range of fastlatent"),
    (b'{"traceEvents": [{"ph": "X", "cat": "user_annotation", "name": "step"}]}', "not a trace of torch.profiler"),
    (b"SQLite format 3\0 and nothing else", "not an export of Nsight Systems"), (b"\x1f\x8bnot gzip", "cannot be read"),
    (b"\xff\xfe\x00", "cannot be read")])
def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, capsys, content, said):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as exit_:
        run_command(profile_report.main, [str(path)])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert len(error.splitlines()) == 1 and error.startswith(f"error: {path}: ")
    assert re.search(said, error)


def test_a_folder_a_report_before_its_export_and_no_file_at_all(tmp_path):
    (tmp_path / "a.nsys-rep").write_bytes(b"x")
    sqlite3.connect(tmp_path / "empty.sqlite").execute("CREATE TABLE t (a INT)").connection.commit()
    for words, said in (([tmp_path], "a folder"), ([tmp_path / "a.nsys-rep"], "nsys export"), ([], "required: FILE"),
                        ([tmp_path / "empty.sqlite"], "holds no range")):
        with pytest.raises(UserError, match=said):
            profile_report.main([str(word) for word in words])
