"""The README's measured numbers, generated from the lines in `baselines/`: `python -m benches.readme` writes them between its markers.

A row is the newest line of its bench, case, variant and machine; each table says what it was measured on. A kind of bench
without a table below is not shown, nor is a line that its table does not keep.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from benches import results
from fastlatent.cli import Parser, run_command
from fastlatent.errors import UserError

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- measured: from benches/baselines by python -m benches.readme -->", "<!-- /measured -->"

Row = Mapping[str, Any]
Cell = Callable[[Row], str]


def metric(name: str, form: str = "{:.2f}", spread: bool = False) -> Cell:
    """The median of a metric, with its 20th and 80th percentile where asked for; empty where the line has none."""

    def cell(row: Row) -> str:
        if name not in row["metrics"]:
            return ""
        low_high = f" ({' to '.join(map(form.format, row['spread'][name]))})" if spread else ""
        return form.format(row["metrics"][name]) + low_high

    return cell


def fact(name: str, form: str = "{}") -> Cell:
    return lambda row: form.format(row["facts"][name]) if row["facts"].get(name) is not None else ""


def change(before: str, after: str) -> Cell:
    """A fact and the metric it became."""
    start, end = fact(before, "{:.2f}"), metric(after)
    return lambda row: f"{start(row)} -> {end(row)}" if end(row) else ""


def mib(name: str) -> Cell:
    return lambda row: f"{row['metrics'][name] / 2**20:.0f}" if name in row["metrics"] else ""


def micros(name: str) -> Cell:
    """Median, 20th and 80th percentile of seconds, in microseconds."""

    def cell(row: Row) -> str:
        middle, low, high = (f"{1e6 * value:.4g}" for value in (row["metrics"][name], *row["spread"][name]))
        return f"{middle} ({low} to {high})"

    return cell


def is_kernel_shown(row: Row) -> bool:
    """Of each op its last shape, forward and backward where it has both; what eager and compiled took is in the ratios."""
    return row["facts"]["is_headline"] and row["variant"] not in ("eager", "torch.compile")


class Table(NamedTuple):
    title: str
    columns: dict[str, Cell]
    is_shown: Callable[[Row], bool] = lambda row: True


TABLES = {
    "learning": Table(
        "What a run learns: mean reward of its first 3 and last 5 steps; greedy accuracy on 128 held-out problems before and "
        "after, and after with the latents switched off or shuffled among rows", {
            "recipe": lambda row: row["case"], "run": lambda row: row["variant"],
            "reward": change("reward_first", "reward_last"), "accuracy": change("accuracy_before", "accuracy_after"),
            "latents off": fact("accuracy_latents_off", "{:.2f}"), "shuffled": fact("accuracy_latents_shuffled", "{:.2f}"),
            "thinking tokens": fact("thinking_length", "{:.1f}"), "wall s": metric("wall_s", "{:.0f}"),
        }),
    "rollout": Table(
        "Rollout: drawn tokens per second beside transformers' `generate`, same prompts, weights and cap, interleaved rounds; "
        "median (20th to 80th percentile). `stops`: rows end at an EOS or newline; `equal`: all rows have equal length; "
        "`recipe`: ours end as the recipe says, generate's at an EOS. `loop`: a transformers loop with the same latents", {
            "prompts x group, ends": lambda row: row["case"], "engine": lambda row: row["variant"],
            "tok/s": metric("rate_tok_s", "{:.0f}", spread=True), "times generate": metric("speed_over_generate", spread=True),
            "times loop": metric("speed_over_loop"), "times discrete": metric("speed_over_discrete"), "dtype": fact("dtype"),
        }),
    "update": Table(
        "Update: loss, backward and optimizer beside trl's on the same tensors, interleaved rounds; median (20th to 80th "
        "percentile)", {
            "batch": lambda row: row["case"], "update": lambda row: row["variant"],
            "seconds": metric("wall_s", spread=True), "times trl": metric("speed_over_trl", spread=True),
            "peak MiB": mib("peak_bytes"), "dtype": fact("dtype"),
        }),
    "kernels": Table(
        "Kernels: each op at its largest measured shape beside its plain torch reference, eager and compiled, from cold caches, "
        "interleaved rounds; median (20th to 80th percentile). GB/s and TFLOP/s count the least traffic and arithmetic; the "
        "share is that of the faster of copying and multiplying alone", {
            "op, shape, dtype, passes": lambda row: row["case"], "implementation": lambda row: row["variant"],
            "us": micros("wall_s"), "GB/s": fact("gb_s", "{:.4g}"), "TFLOP/s": fact("tflop_s", "{:.3g}"),
            "of roofline": metric("roofline_share", "{:.0%}"), "times eager": metric("speed_over_eager", spread=True),
            "times compiled": metric("speed_over_compile", spread=True), "peak MiB": mib("peak_bytes"),
        }, is_kernel_shown),
}


def generated(lines: Iterable[Row]) -> str:
    """The text between the markers, ending in a newline; empty where there are no lines."""
    newest = {(row["bench"], machine(row), row["case"], row["variant"]): row
              for row in sorted(lines, key=lambda row: row["time"])}
    blocks = []
    for bench, table in TABLES.items():
        rows = [row for row in newest.values() if row["bench"] == bench and table.is_shown(row)]
        if rows:
            blocks.append(f"{table.title}.")
        # one table for each set of conditions
        for where, group in groupby(sorted(rows, key=conditions), key=conditions):
            blocks.append(_table(table.columns, list(group)) + f"\n\n<sub>{where}</sub>")
    return "\n\n".join(blocks) + "\n" if blocks else ""


def machine(row: Row) -> str:
    """What a line was measured on."""
    hardware = row["hardware"]
    on = ", ".join(hardware["gpus"]) or f"{hardware['cpu']}, {hardware['cores']} cores"
    return f"{on}, {row['threads']['torch']} threads; {row['facts'].get('model', 'model of the recipe')}"


def conditions(row: Row) -> str:
    """The machine and the software, as printed beneath a table."""
    versions, git = row["versions"], row["git"]
    commit = "no commit" if git is None else f"commit {git['commit'][:7]}" + (" with changes" if git["dirty"] else "")
    return f"{machine(row)}; torch {versions['torch']}, transformers {versions['transformers']}; {commit}, {row['time'][:10]}"


def _table(columns: Mapping[str, Cell], rows: list[Row]) -> str:
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    kept = {name: column for name, column in cells.items() if any(column)}
    lines = [list(kept), ["---"] * len(kept), *zip(*kept.values(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def baselines() -> list[Row]:
    """Every committed line."""
    return [row for path in sorted(results.BASELINES.glob("*.jsonl")) for row in results.read(path)]


def filled(readme: str, text: str) -> str:
    """`readme` with `text` between its markers; UserError where it has not exactly one pair of them."""
    if readme.count(START) != 1 or readme.count(END) != 1:
        raise UserError(f"README.md: wanted one {START!r} and one {END!r}")
    head, _, rest = readme.partition(START)
    return f"{head}{START}\n{text}{END}{rest.partition(END)[2]}"


def main(argv: list[str]) -> None:
    Parser(prog="python -m benches.readme", description=__doc__.splitlines()[0]).parse_args(argv)
    lines = baselines()
    README.write_text(filled(README.read_text(), generated(lines)))
    print(f"{README.name}: {len(lines)} lines of results", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
