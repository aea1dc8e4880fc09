"""What finished runs learnt: `python -m benches.learning RUN...` appends one line for each run folder.

Rewards are those of the training steps, accuracies those of greedy held-out completions; hardware, commit, versions
and threads are the run's own. `wall_s` lasts from the run's manifest to its report, so a resumed run has none.
"""

from __future__ import annotations

import math
import sys
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from benches import results
from benches.results import Result
from fastlatent import log, manifest
from fastlatent.cli import Parser, run_command
from fastlatent.errors import UserError

FACTS = {"thinking_length": "thinking/mean_length", "gate_mean": "latent/gate_mean", "gate_std": "latent/gate_std"} | {
    f"accuracy_latents_{how}": f"eval/accuracy_latents_{how}" for how in ("on", "off", "shuffled")}
"""Facts of a line, and the metrics whose last logged values they are."""

FIRST, LAST = 3, 5
"""Steps averaged at either end of a run."""


def result(folder: Path) -> Result:
    """The line of one run; UserError where it is not finished."""
    story = manifest.read(folder)
    rows = log.read(folder / "metrics.jsonl")
    steps = [row for row in rows if row.get("reward") is not None]
    if not (folder / "report.html").is_file() or len(steps) < LAST:
        raise UserError(f"{folder}: wanted a finished run of at least {LAST} steps, found {len(steps)} steps")
    rewards = [row["reward"] for row in steps]
    samples = {"reward_last": [fmean(rewards[-LAST:])]}
    facts = {"model": story["config"]["model"]["path"], "steps": len(steps), "reward_step_1": rewards[0],
             "reward_first": fmean(rewards[:FIRST]), "steps_s": math.fsum(row["time/step"] for row in steps)}
    logged = {name: value for row in rows for name, value in row.items() if value is not None}  # the last one stays
    facts |= {fact: logged[name] for fact, name in FACTS.items() if name in logged}
    accuracies = [row["eval/accuracy"] for row in rows if row.get("eval/accuracy") is not None]
    if accuracies:
        facts["accuracy_before"], samples["accuracy_after"] = accuracies[0], [accuracies[-1]]
    if not story["sessions"]:
        samples["wall_s"] = [_wall_s(folder, story)]
    recipe, variant = story["config"]["recipe"], f"seed {story['seed']}, {len(steps)} steps"
    return Result(bench="learning", case=recipe, variant=variant, samples=samples, facts=facts)


def _wall_s(folder: Path, story: dict[str, Any]) -> float:
    return (folder / "report.html").stat().st_mtime - datetime.fromisoformat(story["started"]).timestamp()


def _line(result: Result) -> str:
    metrics, facts = result.metrics(), result.facts
    line = f"{result.case} {result.variant}: reward {facts['reward_first']:.3f} -> {metrics['reward_last']:.3f}"
    if "accuracy_after" in metrics:
        line += f", held-out accuracy {facts['accuracy_before']:.3f} -> {metrics['accuracy_after']:.3f}"
    return line + (f", {metrics['wall_s']:.0f} s" if "wall_s" in metrics else "")


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m benches.learning", description=__doc__.splitlines()[0])
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a finished run")
    results.add_out(parser)
    args = parser.parse_args(argv)
    found = [(folder, result(folder)) for folder in args.runs]
    for folder, line in found:
        story = manifest.read(folder)
        machine = {name: story[name] for name in ("git", "hardware", "versions", "threads")}
        machine["time"] = story["started"]
        path = results.append([line], machine, args.out)
        print(_line(line))
        print(f"1 line in {path}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
