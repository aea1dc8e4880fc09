"""Recordings read back as a Timeline: the Chrome trace of torch.profiler, and the sqlite export of Nsight Systems.

The columns of the latter are those that Nsight's documentation lists (`nsys export --type sqlite`): NVTX_EVENTS with
eventType 59 for a push/pop range and 34 for a mark, CUPTI_ACTIVITY_KIND_{KERNEL,MEMCPY,MEMSET,GRAPH_TRACE} with the
correlationId of the call in CUPTI_ACTIVITY_KIND_RUNTIME that asked for them, names in StringIds, nanoseconds throughout. It
has only been run on files made in that form, never on an export of a real report.
"""

from __future__ import annotations

import gzip
import json
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from fastlatent.errors import UserError
from fastlatent.metrics import SPANS
from fastlatent.profiling.timeline import Range, Timeline, Work

DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
CALL = {"cuda_runtime", "cuda_driver"}
MARK, PUSH_POP = 34, 59
NAMELESS = {"CUPTI_ACTIVITY_KIND_MEMCPY": "memcpy", "CUPTI_ACTIVITY_KIND_MEMSET": "memset",
            "CUPTI_ACTIVITY_KIND_GRAPH_TRACE": "CUDA graph"}
"""Work without a name of its own. A graph is a single piece of it, unless nsys was told --cuda-graph-trace=node."""
THREAD_BITS = 24
"""A globalTid is a globalPid with the thread's number in its lowest bits."""


# ---- torch.profiler -------------------------------------------------------------------------------------------------


def read_chrome(path: Path, trace: Any) -> Timeline:
    """The timeline of a parsed Chrome trace; its instants are microseconds."""
    events = [e for e in trace.get("traceEvents", ()) if isinstance(e, dict) and e.get("ph") == "X"]
    try:
        calls = [e for e in events if e.get("cat") in CALL and "correlation" in e.get("args", {})]
        asked = {e["args"]["correlation"]: e["ts"] / 1e6 for e in calls}
        labels = [e for e in events if e.get("cat") == "user_annotation"]
        ranges = [(e["tid"], Range(e["name"], *_seconds(e))) for e in labels if e["name"] in SPANS]
        marks = [(e["tid"], e["ts"] / 1e6, e["name"].partition("=")[2]) for e in labels if e["name"].startswith("tokens=")]
        device = [e for e in events if e.get("cat") in DEVICE]
        work = [_device_work(e, asked) for e in device] if device else _ops([e for e in events if e.get("cat") == "cpu_op"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a trace of torch.profiler (an event without {error})") from None
    return _timeline(path, bool(device), ranges, marks, work)


def _seconds(event: dict) -> tuple[float, float]:
    return event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6


def _device_work(event: dict, asked: dict[int, float]) -> Work:
    start, end = _seconds(event)
    return Work(event["name"], start, end, asked.get(event.get("args", {}).get("correlation"), start), end - start)


def _ops(events: list[dict]) -> list[Work]:
    """Ops with the time that each spent outside the ops it called."""
    out, open_ = [], {}
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        start, end = _seconds(event)
        work = Work(event["name"], start, end, start, end - start)
        callers = open_.setdefault(event["tid"], [])
        while callers and callers[-1].end_s <= start:
            callers.pop()
        if callers:
            callers[-1].own_s -= end - start
        callers.append(work)
        out.append(work)
    return out


# ---- Nsight Systems -------------------------------------------------------------------------------------------------


def read_nsys(path: Path) -> Timeline:
    """The timeline of an Nsight Systems report exported to sqlite."""
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            ranges, marks = _nvtx(database)
            return _timeline(path, True, ranges, marks, list(_activities(database)))
    except sqlite3.Error as error:
        raise UserError(f"{path}: not an export of Nsight Systems ({error})") from None


def _columns(database: sqlite3.Connection, table: str) -> set[str]:
    """Of a table; empty where there is none: nsys makes a table when it has something to put into it."""
    return {row[1] for row in database.execute(f"PRAGMA table_info({table})")}


def _nvtx(database: sqlite3.Connection) -> tuple[list[tuple[int, Range]], list[tuple[int, float, str]]]:
    columns = _columns(database, "NVTX_EVENTS")
    if not columns:
        return [], []
    values = [name for name in ("int64Value", "uint64Value", "int32Value", "uint32Value") if name in columns]
    payload = f"COALESCE({', '.join([*values, 'NULL'])}, NULL)"
    text = "COALESCE(e.text, s.value)" if "textId" in columns else "e.text"
    join = "LEFT JOIN StringIds s ON s.id = e.textId" if "textId" in columns else ""
    ranges, marks = [], []
    for kind, start, end, name, thread, tokens in database.execute(
            f"SELECT e.eventType, e.start, e.end, {text}, e.globalTid, {payload} FROM NVTX_EVENTS e {join}"
            f" WHERE e.eventType IN ({MARK}, {PUSH_POP})"):
        if kind == PUSH_POP and name in SPANS and end is not None:
            ranges.append((thread, Range(name, start / 1e9, end / 1e9, tokens)))
        elif kind == MARK and name and name.partition("=")[0] == "tokens":
            marks.append((thread, start / 1e9, name.partition("=")[2] or str(tokens)))
    return ranges, marks


def _activities(database: sqlite3.Connection) -> Iterable[Work]:
    for table in ("CUPTI_ACTIVITY_KIND_KERNEL", *NAMELESS):
        columns = _columns(database, table)
        if not columns:
            continue
        # correlation ids are counted in each process by itself
        process = "AND r.process = k.globalPid >> :bits" if "globalPid" in columns else ""
        named = "demangledName" if "demangledName" in columns else "shortName"
        name, names = "s.value", f"LEFT JOIN StringIds s ON s.id = k.{named}"
        if table in NAMELESS:
            name, names = f"'{NAMELESS[table]}'", ""
        for start, end, what, asked in database.execute(
                f"""
                SELECT k.start, k.end, {name}, r.start FROM {table} k {names} LEFT JOIN (
                    SELECT correlationId, globalTid >> :bits AS process, MIN(start) AS start
                    FROM CUPTI_ACTIVITY_KIND_RUNTIME GROUP BY correlationId, process
                ) r ON r.correlationId = k.correlationId {process}
                """, {"bits": THREAD_BITS}):
            asked = start if asked is None else asked
            yield Work(what or "unnamed", start / 1e9, end / 1e9, asked / 1e9, (end - start) / 1e9)


# ---- both -----------------------------------------------------------------------------------------------------------


def _timeline(path: Path, is_gpu: bool, ranges: list[tuple[int, Range]], marks: list[tuple[int, float, str]],
              work: list[Work]) -> Timeline:
    """Of the thread that has the spans, with each count of tokens in the innermost range it was made in."""
    if not ranges:
        raise UserError(f"{path}: holds no range of fastlatent; wanted a recording of `profile.steps=...`")
    (main, _) = max(ranges, key=lambda pair: pair[1].end_s - pair[1].start_s)
    timeline = Timeline.of(is_gpu, (r for thread, r in ranges if thread == main), work)
    origin = min(timeline.ranges[0].start_s, *(w.start_s for w in work)) if work else timeline.ranges[0].start_s
    for thread, instant, count in marks:
        inside = [r for r in timeline.ranges if r.start_s <= instant <= r.end_s] if thread == main else []
        if inside and inside[-1].tokens is None and count.isdecimal():
            inside[-1].tokens = int(count)
    for item in (*timeline.ranges, *work):
        item.start_s, item.end_s = item.start_s - origin, item.end_s - origin
    for item in work:
        item.asked_s -= origin
    return timeline


def open_text(path: Path) -> str:
    """The text of a file that may be gzipped."""
    content = path.read_bytes()
    return (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode()


def parse(text: str) -> Any:
    """JSON, or None."""
    try:
        return json.loads(text)
    except ValueError:
        return None
