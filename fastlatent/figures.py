"""The curves of a run, each one question: drawn with matplotlib, without a display."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import BinaryIO

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastlatent.metrics import PHASES, phase_seconds

INK, MUTED, GRID = "#1d2733", "#5b6875", "#e6eaee"
COLOURS = ("#2563a8", "#d9822b", "#3d8f5f", "#8a63b0")
PHASE_COLOURS = dict(zip(PHASES, (COLOURS[0], COLOURS[3], "#c9a227", COLOURS[1], COLOURS[2]), strict=True))
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": GRID,
    "xtick.color": MUTED, "ytick.color": MUTED, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID, "axes.axisbelow": True, "legend.frameon": False, "lines.linewidth": 1.8, "xtick.major.size": 0,
    "ytick.major.size": 0}

KL = {"kl": "to the reference", "policy/approx_kl": "to the sampling weights"}

Draw = Callable[[Axes], None]


def figures_of(rows: list[dict]) -> Iterator[tuple[str, str, Draw]]:
    """Name, caption and drawing of every figure that the rows of metrics.jsonl have data for."""
    if _has(rows, "reward"):
        yield ("reward", "Mean reward of the completions learnt from; the band is one standard deviation.",
               partial(_band, rows=rows, name="reward", spread="reward_std"))
    if _has(rows, "sft/loss"):
        yield ("loss",
               "Distance to the demonstrations in nats: cross-entropy of tokens, KL of mixtures, and both as learnt from.",
               partial(_lines, rows=rows, unit="nats",
                       names={"sft/loss": "loss", "sft/token_loss": "tokens", "sft/latent_kl": "mixtures"}))
    if _has(rows, "eval/accuracy"):
        yield ("accuracy", "Held-out accuracy of the weights after a step.",
               partial(_lines, rows=rows, unit="accuracy", marker="o",
                       names={"eval/accuracy": "greedy", "eval/sampled_accuracy": "sampled"}))
    if _has(rows, "completions/mean_length"):
        yield ("length", "Mean length in tokens: the whole completion, and the part drawn while thinking.",
               partial(_lines, rows=rows, unit="tokens",
                       names={"completions/mean_length": "completion", "thinking/mean_length": "thinking"}))
    if _has(rows, "entropy"):
        yield ("entropy", "Mean entropy of the sampling distribution, nats per token.",
               partial(_lines, rows=rows, unit="entropy", names={"entropy": "entropy"}))
    # zero throughout: no reference is kept, or every update is on policy
    if kl := {name: label for name, label in KL.items() if any(_series(rows, name)[1])}:
        yield ("kl", f"Mean KL estimate {' and '.join(kl.values())}, nats per token.",
               partial(_lines, rows=rows, unit="KL", names=kl))
    if _has(rows, "latent/gate_mean"):
        yield ("gate", "The token's share a of a latent input: mean, and least over dimensions. 1 is tokens only.",
               partial(_lines, rows=rows, unit="a", names={"latent/gate_mean": "mean", "latent/gate_min": "least"}))
    if _has(rows, "time/step"):
        yield ("time", "Seconds of each step, by what they were spent on.", partial(_stack, rows=rows))


def draw(draw_on: Draw, file: BinaryIO) -> None:
    """Write one figure as PNG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.2, 3.1), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        draw_on(axes)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
        figure.savefig(file, format="png", dpi=150)


def _has(rows: list[dict], name: str) -> bool:
    return any(row.get(name) is not None for row in rows)


def _series(rows: list[dict], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of the rows that have a (finite) value."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _lines(axes: Axes, *, rows: list[dict], names: dict[str, str], unit: str, marker: str | None = None) -> None:
    for (name, label), colour in zip(names.items(), COLOURS, strict=False):
        steps, values = _series(rows, name)
        if values:
            dots = marker or ("o" if len(values) == 1 else None)  # a single point makes no line
            axes.plot(steps, values, color=colour, label=label, marker=dots, markersize=4)
    axes.set_ylabel(unit)
    if len(axes.lines) > 1:
        _legend(axes)


def _band(axes: Axes, *, rows: list[dict], name: str, spread: str) -> None:
    both = [row for row in rows if row.get(name) is not None and row.get(spread) is not None]
    low, high = [r[name] - r[spread] for r in both], [r[name] + r[spread] for r in both]
    axes.fill_between([r["step"] for r in both], low, high, color=COLOURS[0], alpha=0.12, linewidth=0)
    _lines(axes, rows=rows, unit=name, names={name: name})


def _stack(axes: Axes, *, rows: list[dict]) -> None:
    """Phases on top of each other, and what none of them accounts for."""
    timed = [row for row in rows if row.get("time/step") is not None]
    seconds = [phase_seconds(row) for row in timed]
    known = [phase for phase in PHASES if any(phase in of_row for of_row in seconds)]
    parts = {phase: [of_row.get(phase, 0.0) for of_row in seconds] for phase in known}
    rest = [max(row["time/step"] - sum(part), 0.0) for row, *part in zip(timed, *parts.values(), strict=True)]
    bottom = [0.0] * len(timed)
    colours = PHASE_COLOURS | {"other": "#b8c1ca"}
    for label, values in (parts | {"other": rest}).items():
        axes.bar([row["step"] for row in timed], values, bottom=bottom, width=0.9, color=colours[label], label=label)
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    axes.set_ylabel("seconds")
    _legend(axes)


def _legend(axes: Axes) -> None:
    """Above the data, where it hides nothing."""
    axes.legend(ncols=6, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, columnspacing=1.2,
                handlelength=1.2)
