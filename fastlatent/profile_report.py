"""What a recording says: time and tokens of every span, how busy the device was in it, what it did, and where it waited.

    python -m fastlatent.profile_report FILE [--figure FIGURE.svg]

FILE is a Chrome trace that `profile.steps=...` wrote, an Nsight Systems report exported to sqlite, or a run's metrics.jsonl.
The numbers are printed, and a page with a timeline is written beside FILE, with nothing to install or to fetch; --figure writes
the timeline alone, coarser, to show elsewhere. metrics.jsonl knows sums of steps only, so it has times and tokens but neither
kernels nor gaps, and no timeline.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

from fastlatent.cli import Parser, run_command
from fastlatent.errors import UserError
from fastlatent.figures import draw, figures_of
from fastlatent.metrics import SPANS
from fastlatent.profiling.page import caption, page, timeline_file, timeline_svg
from fastlatent.profiling.readers import open_text, parse, read_chrome, read_nsys
from fastlatent.profiling.timeline import Row, Timeline, rows_of

NUM_KERNELS = 3
TOKENS = {"step": "num_tokens", "rollout": "num_tokens"}
"""Metric that counts the tokens of a span."""
OUTSIDE = ("evaluate", "checkpoint")
"""Spans that come after a step."""


def main(words: list[str]) -> None:
    parser = Parser(prog="python -m fastlatent.profile_report", description=__doc__.splitlines()[0])
    parser.add_argument("file", metavar="FILE", type=Path, help="Chrome trace, Nsight export in sqlite, or metrics.jsonl")
    parser.add_argument("--figure", metavar="FIGURE.svg", type=Path, help="write the timeline alone, too")
    args = parser.parse_args(words)
    path = args.file
    if args.figure is not None and args.figure.suffix != ".svg":
        raise UserError(f"--figure: wanted a name that ends in .svg, got {args.figure}")
    rows, work, figure, timeline = _read(path)
    if args.figure is not None:
        if timeline is None:
            raise UserError(f"--figure: {path} holds sums of steps, and a timeline needs a recording of `profile.steps=...`")
        _write("--figure", args.figure, timeline_file(timeline))
    lines = [*_table(rows, work), "", *_top(rows, work)]
    print("\n".join(lines).rstrip())
    out = path.with_name(f"{path.name.partition('.')[0]}.profile.html")
    _write("FILE", out, page(path.name, figure, lines))
    print(f"\n{out}")


def _write(what: str, path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{what}: cannot write {path}: {error.strerror}") from None


# ---- what the file is -----------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[list[Row], str, str, Timeline | None]:
    """The rows, what their work is called, the figure as HTML, and the timeline where the file holds one."""
    try:
        if not path.is_file():
            raise UserError(f"{path}: {'a folder, wanted a file' if path.is_dir() else 'no such file'}")
        with path.open("rb") as file:
            head = file.read(16)
        if not head:
            raise UserError(f"{path}: an empty file")
        if path.suffix == ".nsys-rep":
            raise UserError(f"{path}: wanted its export; run nsys export --type sqlite {path}")
        if head == b"SQLite format 3\0":
            return _of_timeline(read_nsys(path))
        text = open_text(path)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if isinstance(trace := parse(text), dict) and "traceEvents" in trace:
        return _of_timeline(read_chrome(path, trace))
    # a last line may be unfinished: the run may still be going on
    lines = [parse(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    if lines and all(isinstance(line, dict) and "step" in line for line in lines):
        return _of_metrics(path, lines)
    raise UserError(f"{path}: neither a Chrome trace, nor an Nsight Systems export in sqlite, nor a run's metrics.jsonl")


def _of_timeline(timeline: Timeline) -> tuple[list[Row], str, str, Timeline]:
    return rows_of(timeline), "kernels" if timeline.is_gpu else "ops", timeline_svg(timeline) + caption(timeline), timeline


def _of_metrics(path: Path, lines: list[dict]) -> tuple[list[Row], str, str, None]:
    """Sums over the lines; a span's parent is in its name, or it is the step."""
    rows: dict[str, Row] = {}
    for line in lines:
        for metric, seconds in line.items():
            name = metric.removeprefix("time/")
            if metric != name and name in SPANS and seconds is not None:
                depth = 0 if name in ("step", *OUTSIDE) else 1 + name.count("/")
                row = rows.setdefault(name, Row(name, depth))
                row.count += 1
                row.host_s += seconds
                if name in TOKENS and TOKENS[name] in line:
                    row.tokens = (row.tokens or 0) + line[TOKENS[name]]
    if not rows:
        raise UserError(f"{path}: has no time/* metric; no step has finished yet")
    order = sorted(rows.values(), key=lambda row: list(SPANS).index(row.name))
    image = BytesIO()
    figures = {name: draw_on for name, _, draw_on in figures_of(lines)}
    if "time" not in figures:
        return order, "", "", None
    draw(figures["time"], image)
    source = base64.b64encode(image.getvalue()).decode()
    return order, "", f'<img alt="Seconds of each step" src="data:image/png;base64,{source}">', None


# ---- as text --------------------------------------------------------------------------------------------------------


def _table(rows: Sequence[Row], work: str) -> Iterator[str]:
    heads = ("times", "seconds", "of step", f"in {work}", "gaps s", "longest ms", "tokens/s") if work else (
        "times", "seconds", "of step", "tokens/s")
    width = max(len("range"), *(2 * row.depth + len(row.name) for row in rows))
    whole = next((row.host_s for row in rows if row.name == "step"), 0.0)
    yield f"{'range':{width}}" + "".join(f"{head:>12}" for head in heads)
    for row in rows:
        cells = [str(row.count), f"{row.host_s:.4g}", _share(row.host_s / whole if whole else None)]
        if work:
            cells += [_share(row.busy_share), _number(row.gap_s), _number(row.longest_gap_s, 1e3)]
        cells.append(_number(row.tokens_per_s))
        yield f"{'  ' * row.depth + row.name:{width}}" + "".join(f"{cell:>12}" for cell in cells)


def _top(rows: Sequence[Row], work: str) -> Iterator[str]:
    """The longest kernels of each range, with their share of all that ran in it."""
    shown = [row for row in rows if row.own_s]
    if not shown:
        return
    width = max(2 * row.depth + len(row.name) for row in shown)
    yield f"longest {work}, with their share of the range's"
    for row in shown:
        total = sum(row.own_s.values())
        for index, (name, seconds) in enumerate(row.top(NUM_KERNELS)):
            label = "  " * row.depth + row.name if index == 0 else ""
            yield f"{label:{width}}{_share(seconds / total if total else None):>8}  {name[:90]}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _number(value: float | None, scale: float = 1.0) -> str:
    return "" if value is None else f"{value * scale:.4g}"


if __name__ == "__main__":
    run_command(main)
