"""What the person at the keyboard sees: a live view on a terminal, a line per step anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from time import monotonic
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastlatent.metrics import phase_seconds
from fastlatent.output import Output

SHOWN = {
    "reward": ("reward", ".3f"), "sft/loss": ("loss", ".3f"), "sft/latent_kl": ("latent kl", ".3f"),
    "completions/mean_length": ("len", ".1f"), "entropy": ("entropy", ".2f"),
    "kl": ("kl", ".4f"), "latent/gate_mean": ("gate", ".3f"), "grad_norm": ("grad", ".2f"),
    "perf/tokens_per_s": ("tok/s", ".0f"), "guard/skipped_steps": ("skipped", ".0f"),
}
"""Metrics in the order they are shown, each with its short name and format."""

QUIET_AT_ZERO = ("kl", "guard/skipped_steps")
GOES_ON = "training goes on without it, its logs are in the run folder"
PHASE_STYLES = {"rollout": "cyan", "reward": "magenta", "sync": "yellow", "score": "blue", "update": "green"}
"""Colours of what a step's time goes into (metrics.PHASES)."""

BARS = "▁▂▃▄▅▆▇█"


class LiveView:
    """Shows the steps of a run while entered; `mode` is auto, plain or quiet. Notes are always printed."""

    def __init__(self, num_steps: int, mode: str = "auto", file: TextIO | None = None):
        self.num_steps, self.mode = num_steps, mode
        file = file or sys.stdout  # None where the process was started without one
        self.console = Console(file=file and Output(file, GOES_ON), highlight=False, soft_wrap=True)
        self.rows: list[Mapping[str, float]] = []
        self._live: Live | None = None
        self._started = monotonic()

    def __enter__(self) -> LiveView:
        self._started = monotonic()
        # a dumb terminal (TERM=dumb: editors, some CI logs) cannot draw over its lines: rich would show nothing until the end
        if self.mode == "auto" and self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(console=self.console, get_renderable=self._panel, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def step(self, metrics: Mapping[str, float]) -> None:
        """Show a finished training step by its metrics."""
        self.rows.append(metrics)
        if self._live is not None:
            self._live.refresh()
        elif self.mode != "quiet":
            self._print(step_line(metrics, self.num_steps))

    def note(self, text: str) -> None:
        """Print a sentence, above the live view where there is one."""
        self._print(text)

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False)
        self.console.file.flush()

    # ---- the live view ---------------------------------------------------------------------------------------------

    def _panel(self) -> Group:
        if not self.rows:
            waited = _clock(monotonic() - self._started)
            return Group(Text(f"before the first of {self.num_steps} steps · {waited}", style="dim"))
        return Group(self._progress(), self._numbers(), self._time_split())

    def _progress(self) -> Table:
        step, elapsed = self.rows[-1]["step"], monotonic() - self._started
        left = elapsed / len(self.rows) * (self.num_steps - step)
        table = Table.grid(padding=(0, 2))
        table.add_row(Text(f"step {step}/{self.num_steps}", style="bold"),
                      ProgressBar(total=self.num_steps, completed=step, width=40),
                      Text(f"{_clock(elapsed)} elapsed · {_clock(left)} left", style="dim"))
        return table

    def _numbers(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name in _shown(self.rows[-1]):
            label, form = SHOWN[name]
            values = [row[name] for row in self.rows if row.get(name) is not None]
            table.add_row(Text(label, style="dim"), Text(format(values[-1], form), justify="right", style="bold"),
                          Text(sparkline(values[-40:]), style="cyan"))
        return table

    def _time_split(self) -> Text:
        split, text = time_split(self.rows[-1]), Text()
        text.append("time     ", style="dim")
        for phase, share in split.items():
            text.append("█" * round(20 * share), style=PHASE_STYLES[phase])
        for phase, share in split.items():
            text.append(f" {phase} {share:.0%}", style=PHASE_STYLES[phase])
        return text


def step_line(metrics: Mapping[str, float], num_steps: int) -> str:
    """`step 3/20 reward 0.312 len 18.4 ... tok/s 612 | rollout 62% reward 1% update 35%`."""
    words = [f"step {metrics['step']}/{num_steps}"]
    words += [f"{SHOWN[name][0]} {metrics[name]:{SHOWN[name][1]}}" for name in _shown(metrics)]
    split = [f"{phase} {share:.0%}" for phase, share in time_split(metrics).items()]
    return " ".join(words) + (f" | {' '.join(split)}" if split else "")


def time_split(metrics: Mapping[str, float]) -> dict[str, float]:
    """Share of the step's time that each of PHASES took; disjoint."""
    total = metrics.get("time/step")
    return {phase: seconds / total for phase, seconds in phase_seconds(metrics).items()} if total else {}


def sparkline(values: Sequence[float]) -> str:
    """A bar per value, from the least to the largest of them."""
    low, high = min(values), max(values)
    if not high > low:  # equal, or not finite
        return BARS[0] * len(values)
    return "".join(BARS[round((v - low) / (high - low) * (len(BARS) - 1))] if v - v == 0 else " " for v in values)


def _shown(metrics: Mapping[str, float]) -> list[str]:
    return [name for name in SHOWN if metrics.get(name) is not None and (metrics[name] or name not in QUIET_AT_ZERO)]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
