"""The page of a recording: a timeline of its spans and of the device, drawn as SVG, over the numbers that are printed too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from fastlatent.figures import INK, MUTED, PHASE_COLOURS
from fastlatent.metrics import PHASES
from fastlatent.profiling.timeline import Timeline, union
from fastlatent.report import STYLE

WIDE = "body { max-width: none; } svg { width: 100%; } pre { font: .8rem monospace; white-space: pre; overflow-x: auto; }"
SVG = "http://www.w3.org/2000/svg"
WIDTH, HEIGHT, GAP = 1600, 20, 3
FINE, COARSE = 0.4, 2.0
"""Smallest thing that is drawn, in pixels: shorter ranges side by side are drawn as one, so that a page stays small."""

LETTER = 7.0
"""Width of a letter, generously."""


def page(name: str, figure: str, lines: Sequence[str]) -> str:
    """A whole HTML page; `figure` is HTML, `lines` are text."""
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f"<title>{escape(name)}</title><style>{STYLE}{WIDE}</style></head><body><h1>{escape(name)}</h1>{figure}"
            f"<pre>{escape(chr(10).join(lines))}</pre></body></html>\n")


def timeline_svg(timeline: Timeline, smallest: float = FINE) -> str:
    """A line for each depth of ranges and one for the device; hovering shows what something is and how long it took.

    `smallest` is the width in pixels below which things are drawn as one.
    """
    end_s = max(item.end_s for item in (*timeline.ranges, *timeline.work))
    scale = WIDTH / end_s if end_s else 0.0
    depths = 1 + max(range_.depth for range_ in timeline.ranges)
    boxes = [box for depth in range(depths) for box in _ranges(timeline, depth, scale, smallest)]
    intervals = union(((w.start_s, w.end_s) for w in timeline.work), gap_s=smallest / scale if scale else 0.0)
    boxes += [_box(start, end, depths, scale, smallest, MUTED, _at_work(timeline), "") for start, end in intervals]
    height = (depths + 1) * (HEIGHT + GAP) + HEIGHT
    axis = f'<text x="0" y="{height - GAP}" fill="{MUTED}">0 s</text>' \
           f'<text x="{WIDTH}" y="{height - GAP}" fill="{MUTED}" text-anchor="end">{end_s:.4g} s</text>'
    return (f'<svg viewBox="0 0 {WIDTH} {height}" font-size="11" font-family="DejaVu Sans, Verdana, sans-serif" role="img" '
            f'aria-label="timeline">{"".join(boxes)}{axis}</svg>')


def timeline_file(timeline: Timeline) -> str:
    """The timeline as an image of its own, which needs a name space, and white wherever it is shown."""
    return timeline_svg(timeline, COARSE).replace("<svg ", f'<svg xmlns="{SVG}" style="background: #fff" ', 1) + "\n"


def caption(timeline: Timeline) -> str:
    return f'<p class="about">Spans by depth, and when {_at_work(timeline)}.</p>'


def _at_work(timeline: Timeline) -> str:
    return "the GPU was at work" if timeline.is_gpu else "the CPU ran an op"


def _ranges(timeline: Timeline, depth: int, scale: float, smallest: float) -> Iterator[str]:
    """The ranges of one depth; one that is too short to be seen is drawn where nothing has been drawn yet."""
    drawn_to = -1.0
    for range_ in (r for r in timeline.ranges if r.depth == depth):
        if range_.end_s * scale < drawn_to:
            continue
        tokens = "" if range_.tokens is None else f", {range_.tokens} tokens"
        yield _box(range_.start_s, range_.end_s, depth, scale, smallest, _colour(range_.name),
                   f"{range_.name}: {_duration(range_.end_s - range_.start_s)}{tokens}", range_.name)
        drawn_to = max(range_.end_s * scale, range_.start_s * scale + smallest)


def _box(start_s: float, end_s: float, line: int, scale: float, smallest: float, colour: str, told: str, label: str) -> str:
    x, width = start_s * scale, max((end_s - start_s) * scale, smallest)
    y = line * (HEIGHT + GAP)
    # the whole name, its last part, or nothing
    fitting = next((text for text in (label, label.rpartition("/")[2]) if text and width > LETTER * len(text) + 6), "")
    text = f'<text x="{x + 3:.1f}" y="{y + 14}" fill="{INK}">{escape(fitting)}</text>' if fitting else ""
    return (f'<g><title>{escape(told)}</title><rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{HEIGHT}" '
            f'fill="{colour}" fill-opacity="0.55"/>{text}</g>')


def _duration(seconds: float) -> str:
    return f"{seconds:.4g} s" if seconds >= 1 else f"{1e3 * seconds:.4g} ms"


def _colour(name: str) -> str:
    """By what the span belongs to, as in the report of a run."""
    phase = next((phase for phase, spans in PHASES.items() if name in spans), name.partition("/")[0])
    return PHASE_COLOURS.get(phase, "#d5dce3" if phase == "step" else "#b8c1ca")
