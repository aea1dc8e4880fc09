import ast
import json
import math
import random
import re
import struct
from pathlib import Path

import pytest
from full_disk import full_disk

import fastlatent
from fastlatent.live import SHOWN
from fastlatent.log import MetricsLog, StepLog, read
from fastlatent.metrics import NAMES, PHASES, SPANS, check, is_reproducible, phase_seconds

SOURCE = Path(fastlatent.__file__).parent


def test_every_span_in_the_source_is_in_the_table_and_is_timed():
    used = {node.args[0].value for path in SOURCE.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "span"}
    assert len(used) > 8
    assert used == set(SPANS)
    assert all(f"time/{name}" in NAMES for name in SPANS)


def test_what_a_step_is_spent_on_is_disjoint_and_sums_to_the_spans_of_its_first_level():
    row = {"time/step": 10.0, "time/rollout": 5.0, "time/rollout/decode": 3.0, "time/rollout/reward": 0.5,
           "time/rollout/weight_sync": 0.25, "time/score_old": 1.0, "time/score_ref": 0.5, "time/update": 2.5,
           "time/update/head": 1.0}
    assert phase_seconds(row) == {"rollout": 4.25, "reward": 0.5, "sync": 0.25, "score": 1.5, "update": 2.5}
    # of demonstrations nothing is drawn, and a logged null is no time
    assert phase_seconds({"time/step": 2.0, "time/update": 1.5, "time/score_old": None}) == {"update": 1.5}
    assert {span for spans in PHASES.values() for span in spans} <= set(SPANS)


def test_every_metric_name_in_the_source_is_in_the_table():
    def literals(node):
        if isinstance(node, ast.JoinedStr):
            return
        value = getattr(node, "value", None)
        if isinstance(value, str) and re.fullmatch(r"[a-z]+(/[a-z_]+)+", value):
            yield value
        for child in ast.iter_child_nodes(node):
            yield from literals(child)

    files = ("step_metrics.py", "guard.py", "figures.py", "report.py")
    paths = [*(SOURCE / name for name in files), *(SOURCE / "methods").glob("*.py")]
    used = {name for path in paths for name in literals(ast.parse(path.read_text()))}
    assert len(used) > 15
    assert [name for name in used | set(SHOWN) if name not in NAMES and name not in SPANS] == []


def test_a_name_is_known_by_entry_or_by_pattern():
    assert check("reward") == "reward"
    assert check("rewards/my_module.my_reward/std") == "rewards/{func}/std"
    assert check("guard/reward_timeouts") == "guard/reward_{failure}"
    for name in ("rewards", "rewards/a/b/mean", "rewards//mean", "time/lunch", "Reward", "reward "):
        with pytest.raises(KeyError, match="is not a metric"):
            check(name)


def test_only_clocks_and_meters_may_differ_between_equal_runs():
    assert {name.split("/")[0] for name in NAMES if not is_reproducible(name)} == {"time", "perf"}


def test_an_unknown_metric_is_refused_and_nothing_is_written(tmp_path):
    log = MetricsLog(tmp_path)
    with pytest.raises(KeyError):
        log.append({"step": 1, "reward": 1.0, "rewad": 1.0})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_floats_come_back_bit_for_bit(tmp_path):
    rng = random.Random(0)
    drawn = (struct.unpack("d", rng.randbytes(8))[0] for _ in range(500))
    values = [0.1, -0.0, 5e-324, *(v for v in drawn if math.isfinite(v))]
    log = MetricsLog(tmp_path)
    for step, value in enumerate(values):
        log.append({"step": step, "reward": value})
    back = [row["reward"] for row in read(tmp_path / "metrics.jsonl")]
    assert [struct.pack("d", v) for v in back] == [struct.pack("d", v) for v in values]


def test_what_is_not_finite_is_null_and_the_line_stays_json(tmp_path):
    log = StepLog(tmp_path / "samples.jsonl")
    log.append({"step": 1, "reward": math.nan, "rewards": {"a": math.inf, "b": [1, -math.inf]}})

    def refuse(word):
        raise AssertionError(word)

    (line,) = (tmp_path / "samples.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=refuse)
    assert row == {"step": 1, "reward": None, "rewards": {"a": None, "b": [1, None]}}


def test_a_torn_last_line_is_not_read_and_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "rew')
    assert read(path) == [{"step": 1}]
    MetricsLog(tmp_path).append({"step": 2, "reward": 1.0})
    assert read(path) == [{"step": 1}, {"step": 2, "reward": 1.0}]


def test_a_disk_that_takes_no_more_leaves_whole_lines(tmp_path):
    log = StepLog(tmp_path / "samples.jsonl")
    log.append({"step": 1})
    with full_disk(20), pytest.raises(OSError):
        log.append({"step": 2, "reward": 1.0})
    assert log.path.read_bytes() == b'{"step": 1}\n'
    log.close()
    assert read(log.path) == [{"step": 1}]


def test_line_separators_of_a_completion_do_not_split_its_row(tmp_path):
    row = {"step": 1, "completion": "a\u2028b\rc\x85d\x0be\nf"}
    StepLog(tmp_path / "samples.jsonl").append(row)
    assert read(tmp_path / "samples.jsonl") == [row]


def test_truncating_to_a_position_forgets_exactly_what_came_later(tmp_path):
    log = StepLog(tmp_path / "samples.jsonl")
    log.append({"step": 1}, {"step": 1})
    before, place = log.path.read_bytes(), log.position()
    log.append({"step": 1, "late": True}, {"step": 2})
    log.truncate(place)
    assert log.path.read_bytes() == before and log.position() == place
    log.append({"step": 2})
    assert [r["step"] for r in read(log.path)] == [1, 1, 2]
    log.truncate(10**9)
    assert len(read(log.path)) == 3
