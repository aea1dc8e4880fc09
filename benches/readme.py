"""What the README generates, written between its markers by `python -m benches.readme`: measured numbers, from the lines in
`baselines/`, and what was ever seen of the paths that need a GPU, from `gpu_status.jsonl`.

A row of numbers is the newest line of its bench, case, variant and machine; each table says what it was measured on. A kind of
bench without a table below is not shown, nor is a line that its table does not keep. Of a recipe that has become longer the
shorter runs are not shown.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from benches import gpu_status, results
from fastlatent.cli import Parser, run_command
from fastlatent.errors import UserError

README = Path(__file__).parents[1] / "README.md"
MEASURED = "<!-- measured: from benches/baselines by python -m benches.readme -->", "<!-- /measured -->"
GPU = "<!-- gpu: from benches/gpu_status.jsonl by python -m benches.readme -->", "<!-- /gpu -->"

LONG = 16
"""Rows of a table beyond which it is folded."""

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
        seconds = row["metrics"][name], *row["spread"][name]
        middle, low, high = (f"{1e6 * s:,.0f}" if s >= 1e-3 else f"{1e6 * s:.4g}" for s in seconds)
        return f"{middle} ({low} to {high})"

    return cell


def is_kernel_shown(row: Row) -> bool:
    """Of each op its last shape, forward and backward where it has both; what eager and compiled took is in the ratios."""
    return row["facts"]["is_headline"] and row["variant"] not in ("eager", "torch.compile")


def is_recipe_as_it_is(row: Row) -> bool:
    """Not a run that was given other options than its recipe's, but for the engine that drew."""
    return not (row["facts"].get("changes") or {}).keys() - {"engine.name"}


class Table(NamedTuple):
    title: str
    columns: dict[str, Cell]
    is_shown: Callable[[Row], bool] = lambda row: True
    order: Callable[[Row], Any] = lambda row: row["time"]


TABLES = {
    "learning": Table(
        "What a run learns: mean reward of its first 3 and last 5 steps; greedy accuracy on 128 held-out problems before and "
        "after, and after with the latents switched off or shuffled among rows; tokens of thinking in those "
        "completions, after", {
            "recipe": lambda row: row["case"], "run": lambda row: row["variant"],
            "reward": change("reward_first", "reward_last"), "accuracy": change("accuracy_before", "accuracy_after"),
            "latents off": fact("accuracy_latents_off", "{:.2f}"), "shuffled": fact("accuracy_latents_shuffled", "{:.2f}"),
            "thinking tokens": fact("thinking_after", "{:.1f}"), "collapse alarms": fact("alarms"),
            "wall s": metric("wall_s", "{:.0f}"),
        }, is_recipe_as_it_is, order=lambda row: (row["case"], row["variant"])),
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
    "step": Table(
        "A whole HRPO training step (weights to the engine, rollout, reward, update) beside the released trainer's, "
        "re-created: its rollout loop, then trl's update, padded; same prompts, sizes and lengths, interleaved rounds; median "
        "(20th to 80th percentile)", {
            "prompts x group": lambda row: row["case"], "step": lambda row: row["variant"],
            "seconds": metric("wall_s", spread=True), "of which rollout": metric("rollout_s"),
            "times released": metric("speed_over_released", spread=True), "dtype": fact("dtype"),
        }),
    "kernels": Table(
        "Kernels: each op at its largest measured shape beside its plain torch reference, eager and compiled, from cold "
        "caches, "
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
              for row in not_outgrown(sorted(lines, key=lambda row: row["time"]))}
    blocks = []
    for bench, table in TABLES.items():
        rows = [row for row in newest.values() if row["bench"] == bench and table.is_shown(row)]
        if rows:
            blocks.append(f"{table.title}.")
        # one table for each set of conditions
        for where, group in groupby(sorted(rows, key=lambda row: (conditions(row), table.order(row))), key=conditions):
            shown = list(group)
            text = _table(table.columns, shown)
            if len(shown) > LONG:
                text = f"<details><summary>{len(shown)} rows</summary>\n\n{text}\n\n</details>"
            blocks.append(f"{text}\n\n<sub>{where}</sub>")
    return "\n\n".join(blocks) + "\n" if blocks else ""


def not_outgrown(lines: list[Row]) -> list[Row]:
    """Without runs of fewer steps than the newest of their recipe on their machine; `lines` from the oldest on."""
    steps = {_recipe(row): row["facts"]["steps"] for row in lines if row["bench"] == "learning"}
    return [row for row in lines if row["bench"] != "learning" or row["facts"]["steps"] >= steps[_recipe(row)]]


def _recipe(row: Row) -> tuple[str, str, str]:
    """Of a learning run: where, what, and with which options of its own; the seed and the number of steps left out."""
    return machine(row), row["case"], re.sub(r"^seed -?\d+, \d+ steps", "", row["variant"])


def machine(row: Row) -> str:
    """What a line was measured on."""
    hardware = row["hardware"]
    on = ", ".join(hardware["gpus"]) or f"{hardware['cpu']}, {hardware['cores']} cores"
    return f"{on}, {row['threads']['torch']} threads; {row['facts'].get('model', 'model of the recipe')}"


def conditions(row: Row) -> str:
    """The machine and the software, as printed beneath a table."""
    versions = row["versions"]
    return f"{machine(row)}; torch {versions['torch']}, transformers {versions['transformers']}; {row['time'][:7]}"


def commit(row: Row) -> str:
    """What was measured; `+` where files were changed since."""
    git = row["git"]
    return "" if git is None else git["commit"][:7] + ("+" if git["dirty"] else "")


def _table(columns: dict[str, Cell], rows: list[Row]) -> str:
    cells = {name: [cell(row) for row in rows] for name, cell in (columns | {"commit": commit}).items()}
    kept = {name: column for name, column in cells.items() if any(column)}
    lines = [list(kept), ["---"] * len(kept), *zip(*kept.values(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def baselines() -> list[Row]:
    """Every committed line."""
    return [row for path in sorted(results.BASELINES.glob("*.jsonl")) for row in results.read(path)]


def filled(readme: str, text: str, markers: tuple[str, str] = MEASURED) -> str:
    """`readme` with `text` between the markers; UserError where it has not exactly one pair of them."""
    start, end = markers
    if readme.count(start) != 1 or readme.count(end) != 1:
        raise UserError(f"README.md: wanted one {start!r} and one {end!r}")
    head, _, rest = readme.partition(start)
    return f"{head}{start}\n{text}{end}{rest.partition(end)[2]}"


def whole(readme: str) -> str:
    """`readme` with everything generated anew."""
    return filled(filled(readme, generated(baselines())), gpu_status.table(gpu_status.read()), GPU)


def main(argv: list[str]) -> None:
    Parser(prog="python -m benches.readme", description=__doc__.splitlines()[0]).parse_args(argv)
    README.write_text(whole(README.read_text()))
    print(f"{README.name}: {len(baselines())} lines of results, {len(gpu_status.read())} paths of a GPU", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
