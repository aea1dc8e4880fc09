"""Hold results side by side: `python -m benches.compare A B` marks every metric that changed by more than 15 percent.

A and B are files of results, or `FILE@COMMIT` for the lines of one commit; of lines about the same thing the newest
counts. Exits with 1 where something got worse, or where A measured what B did not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benches import results
from fastlatent.cli import Parser, run_command
from fastlatent.errors import UserError

THRESHOLD = 0.15

Key = tuple[str, str, str]  # bench, case and model, variant
Rows = dict[Key, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Change:
    key: Key
    metric: str
    before: float
    after: float | None  # None: not measured any more

    @property
    def relative(self) -> float:
        return self.after / self.before - 1 if self.before else 0.0

    def verdict(self, threshold: float) -> str:
        """worse, better, missing, or nothing where the change is within the threshold."""
        if self.after is None:
            return "missing"
        if abs(self.relative) <= threshold:
            return ""
        return "worse" if (self.relative > 0) == is_better_low(self.metric) else "better"


def is_better_low(metric: str) -> bool:
    """Seconds and bytes; rates, ratios, shares, rewards and accuracies are better high."""
    return metric.endswith("_bytes") or (metric.endswith("_s") and not metric.endswith("_tok_s"))


def load(source: str) -> Rows:
    """The newest line about each thing in FILE or FILE@COMMIT; UserError where there is none."""
    # a file of that very name wins over a commit
    name, _, commit = (source, "", "") if Path(source).exists() else source.rpartition("@")
    rows = [row for row in results.read(Path(name or source)) if not commit or _commit(row).startswith(commit)]
    if not rows:
        raise UserError(f"{source}: holds no results")
    return {(row["bench"], row["case"] + _model(row), row["variant"]): row for row in rows}


def changes(before: Rows, after: Rows) -> list[Change]:
    """Every metric of `before`, beside its value in `after`."""
    return [Change(key, metric, value, after.get(key, {"metrics": {}})["metrics"].get(metric))
            for key, row in before.items() for metric, value in row["metrics"].items()]


def table(found: Sequence[Change], threshold: float) -> list[str]:
    names = [" / ".join((*change.key, change.metric)) for change in found]
    lines, width = [], max(map(len, names), default=0)
    for name, change in zip(names, found, strict=True):
        moved = f"{'-':>12s} {'':8s}" if change.after is None else f"{change.after:12.4g} {change.relative:+8.1%}"
        lines.append(f"{name:{width}s} {change.before:12.4g} {moved} {change.verdict(threshold)}".rstrip())
    return lines


def _model(row: dict[str, Any]) -> str:
    """One case is measured with several models; wherever a model's folder lies, its name is the same."""
    model = (row.get("facts") or {}).get("model")
    return "" if model is None else f" ({Path(model).name})"


def _commit(row: dict[str, Any]) -> str:
    return (row.get("git") or {}).get("commit", "")


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m benches.compare", description=__doc__)
    parser.add_argument("before", metavar="A")
    parser.add_argument("after", metavar="B")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="relative change to mark (default: 0.15)")
    args = parser.parse_args(argv)
    before, after = load(args.before), load(args.after)
    places = [{results.hardware_name(row["hardware"]) for row in rows.values()} for rows in (before, after)]
    if places[0] != places[1]:
        print(f"not the same hardware: {', '.join(sorted(places[0]))} before, {', '.join(sorted(places[1]))} after")
    found = changes(before, after)
    print("\n".join(table(found, args.threshold)))
    return int(any(change.verdict(args.threshold) in ("worse", "missing") for change in found))


if __name__ == "__main__":
    run_command(main)
