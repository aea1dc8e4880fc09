"""What finished runs learnt: `python -m benches.learning RUN...` appends one line for each run folder.

Rewards are those of the training steps (losses, where demonstrations were imitated), accuracies and thinking lengths those of
greedy held-out completions before the first step and after the last; hardware, commit, versions and threads are the run's own.
`wall_s` lasts from the run's manifest to its report, so a resumed run has none. A run that was given other options than its
recipe names says so in its variant.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from benches import results
from benches.results import Result
from fastlatent import log, manifest
from fastlatent.alarms import CollapseAlarm
from fastlatent.cli import Parser, run_command
from fastlatent.config import load_config, to_dict
from fastlatent.errors import UserError

LATENTS = ("on", "off", "shuffled")
ABLATIONS = {f"accuracy_latents_{how}": f"eval/accuracy_latents_{how}" for how in LATENTS}
LAST_LOGGED = ABLATIONS | {"gate_mean": "latent/gate_mean", "gate_std": "latent/gate_std", "effective_k": "latent/effective_k"}
"""Facts of a line, and the metrics whose last logged values they are."""

FIRST, LAST = 3, 5
"""Steps averaged at either end of a run."""

UNTOLD = ("recipe", "seed", "num_steps", "out", "resume", "model.path", "data.train", "data.held_out", "engine", "log",
          "checkpoint", "profile")
"""Options that are told elsewhere in a line, or teach nothing; which engine drew is told."""


def result(folder: Path) -> Result:
    """The line of one run; UserError where it is not finished."""
    story = manifest.read(folder)
    rows = log.read(folder / "metrics.jsonl")
    steps = [row for row in rows if "time/step" in row and ("sft/loss" in row or row.get("reward") is not None)]
    if not (folder / "report.html").is_file() or len(steps) < LAST:
        raise UserError(f"{folder}: wanted a finished run of at least {LAST} steps, found {len(steps)} steps")
    config, samples = story["config"], {}
    facts = _model(config["model"]["path"]) | {"steps": len(steps), "steps_s": math.fsum(row["time/step"] for row in steps)}
    if "sft/loss" in steps[0]:
        facts |= _curve("loss", [row["sft/loss"] for row in steps])
    else:
        rewards = [row["reward"] for row in steps]
        facts |= _curve("reward", rewards)
        samples["reward_last"] = [facts.pop("reward_last")]
        # of sampled completions; a demonstration's length is the data's own
        facts["thinking_length"] = steps[-1].get("thinking/mean_length")
    facts |= _held_out(rows, samples)
    facts["alarms"] = _alarms(steps)
    if not story["sessions"]:
        samples["wall_s"] = [_wall_s(folder, story)]
    facts["changes"] = dict(_changes(config))
    variant = ", ".join([f"seed {story['seed']}", f"{len(steps)} steps", *(f"{k}={v}" for k, v in facts["changes"].items())])
    facts = {name: value for name, value in facts.items() if value is not None}
    return Result(bench="learning", case=config["recipe"], variant=variant, samples=samples, facts=facts)


def _model(path: str) -> dict[str, str]:
    """The model by name; where it is what another run left, the name of that one's and how far that run had come."""
    told = Path(path) / "fastlatent.json"
    if not told.is_file():
        return {"model": Path(path).name if Path(path).is_dir() else path}
    story = json.loads(told.read_text())
    config = story["config"]
    return _model(config["model"]["path"]) | {"start": f"{config['recipe']}, seed {config['seed']}, {story['checkpoint']}"}


def _curve(name: str, values: list[float]) -> dict[str, Any]:
    """The values of all steps, and what is told of them."""
    return {{"reward": "rewards", "loss": "losses"}[name]: [round(value, 4) for value in values], f"{name}_step_1": values[0],
            f"{name}_first": fmean(values[:FIRST]), f"{name}_last": fmean(values[-LAST:])}


def _held_out(rows: list[dict], samples: dict[str, list[float]]) -> dict[str, Any]:
    """Accuracy, length and ablations at either end; the accuracy after goes into `samples`."""
    facts: dict[str, Any] = {}
    logged = {name: value for row in rows for name, value in row.items() if value is not None}  # the last one stays
    facts |= {fact: logged[name] for fact, name in LAST_LOGGED.items() if name in logged}
    evaluated = [row for row in rows if row.get("eval/accuracy") is not None]
    if evaluated:
        before, after = evaluated[0], evaluated[-1]
        facts["accuracy_before"], samples["accuracy_after"] = before["eval/accuracy"], [after["eval/accuracy"]]
        facts |= {"thinking_before": before.get("eval/thinking_length"), "thinking_after": after.get("eval/thinking_length")}
        facts |= {f"{fact}_before": before.get(name) for fact, name in ABLATIONS.items()}
    return facts


def _alarms(steps: list[dict]) -> str | None:
    """What the collapse alarms of the run came to, in a word or by name; None where they could not tell."""
    alarm = CollapseAlarm()
    for row in steps:
        alarm.step(row)
    return ", ".join(sorted(alarm.sounded)) or "quiet" if alarm.can_tell else None


def _changes(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Options of a run that are not its recipe's as that is today; none where there is no such recipe."""
    given = {path: value for path, value in _flat(config) if value is not None}
    words = [f"{path}={given[path]}" for path in ("model.path", "data.train", "data.held_out") if path in given]
    try:
        recipe = dict(_flat(to_dict(load_config(config["recipe"], *words))))
    except UserError:
        return
    for path, value in _flat(config):
        is_told = path == "engine.name" or not {path, path.partition(".")[0]} & set(UNTOLD)
        if is_told and value != recipe.get(path):
            yield path, value


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _wall_s(folder: Path, story: dict[str, Any]) -> float:
    return (folder / "report.html").stat().st_mtime - datetime.fromisoformat(story["started"]).timestamp()


def _line(result: Result) -> str:
    metrics, facts = result.metrics(), result.facts
    what, last = ("reward", metrics["reward_last"]) if "reward_last" in metrics else ("loss", facts["loss_last"])
    line = f"{result.case} {result.variant}: {what} {facts[f'{what}_first']:.3f} -> {last:.3f}"
    if "accuracy_after" in metrics:
        line += f", held-out accuracy {facts['accuracy_before']:.3f} -> {metrics['accuracy_after']:.3f}"
    if "thinking_after" in facts:
        line += f" at {facts['thinking_after']:.1f} tokens of thinking"
    if "alarms" in facts:
        line += f", collapse alarms: {facts['alarms']}"
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
