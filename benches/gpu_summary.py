"""The battery on one page of markdown: what ran and what became of it, what failed, and the numbers that were measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

MOST_FAILURES = 12
"""Failed tests that are named; all are in the log."""

RATES = {"rollout": {"x generate": ("speed_over_generate", "{:.2f}"), "x loop": ("speed_over_loop", "{:.2f}"),
                     "x discrete": ("speed_over_discrete", "{:.2f}")},
         "update": {"x trl": ("speed_over_trl", "{:.2f}"), "MFU": ("mfu_share", "{:.1%}")},
         "step": {"rollout s": ("rollout_s", "{:.3g}"), "x released": ("speed_over_released", "{:.2f}")}}
"""Of benchmarks in tokens per second: what else is shown, from which metric and how it is written."""


def summary(parts: Sequence[Row], results: Sequence[Row]) -> str:
    """`parts` are the lines of parts.jsonl, `results` those of results.jsonl; of lines about one thing the last counts."""
    last = {(row["part"], row["step"]): row for row in parts}
    measured = list({(row["bench"], row["facts"].get("model"), row["case"], row["variant"]): row for row in results}.values())
    blocks = [_heading(parts, results), *_parts(last.values()), *_tests(last.values()), *_checkers(last.values()),
              *_kernels(measured), *_rates(measured), *_learning(measured)]
    return "\n\n".join(blocks) + "\n"


def _heading(parts: Sequence[Row], results: Sequence[Row]) -> str:
    commits = sorted({(row["commit"] or "unknown")[:10] for row in parts})
    lines = ["# Battery", f"device {', '.join(sorted({row['device'] for row in parts}))}; commit {', '.join(commits)}; "
             f"{parts[0]['time']} to {parts[-1]['time']}"]
    if results:
        hardware, versions = results[-1]["hardware"], results[-1]["versions"]
        names = ", ".join(hardware["gpus"]) or hardware["cpu"]
        packages = ("python", "torch", "cuda", "triton", "transformers")
        known = ", ".join(f"{name} {versions[name]}" for name in packages if versions.get(name))
        lines.append(f"{names}, {hardware['cores']} cores; {known}")
    return "\n\n".join(lines)


def _parts(rows: Iterable[Row]) -> list[str]:
    return [table(("part", "step", "result", "s", "note"), [
        (row["part"], row["step"], row["status"], f"{row['seconds']:.0f}", row["note"]) for row in rows])]


def _tests(rows: Iterable[Row]) -> list[str]:
    out = []
    for row in rows:
        found = row["details"]
        if counts := found.get("tests"):
            told = ", ".join(f"{number} {what}" for what, number in sorted(counts.items()))
            out.append(f"Tests, {row['step']}: {told}.")
        if bad := found.get("failed"):
            more = [f"- and {len(bad) - MOST_FAILURES} more, see log.txt"] if len(bad) > MOST_FAILURES else []
            out.append("\n".join([*(f"- `{node}`" for node in bad[:MOST_FAILURES]), *more]))
        if ran := found.get("ran"):
            out.append(f"{row['step'].capitalize()} ({row['part']}):\n" + "\n".join(f"- {line}" for line in ran))
    return out


def _checkers(rows: Iterable[Row]) -> list[str]:
    return [f"{row['step']}:\n" + "\n".join(f"- {line}" for line in row["details"]["checker"])
            for row in rows if row["details"].get("checker")]


def _kernels(rows: Sequence[Row]) -> list[str]:
    """Of each op its last shape in its widest direction."""
    shown = [row for row in rows if row["bench"] == "kernels" and row["facts"]["is_headline"]]
    if not shown:
        return []
    number = lambda row, name, form: form.format(row["metrics"][name]) if name in row["metrics"] else ""
    return [table(("op, shape, dtype, passes", "implementation", "us", "of roofline", "x eager", "x compiled", "peak MiB"), [
        (row["case"], row["variant"], f"{1e6 * row['metrics']['wall_s']:.4g}", number(row, "roofline_share", "{:.0%}"),
         number(row, "speed_over_eager", "{:.2f}"), number(row, "speed_over_compile", "{:.2f}"),
         f"{row['metrics']['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row["metrics"] else "") for row in shown])]


def _rates(rows: Sequence[Row]) -> list[str]:
    out = []
    for bench, more in RATES.items():
        lines = [(row["facts"]["model"].rpartition("/")[2], row["case"], row["variant"], f"{row['metrics']['rate_tok_s']:.0f}",
                  f"{row['metrics']['wall_s']:.3g}",
                  *(form.format(row["metrics"][metric]) if metric in row["metrics"] else "" for metric, form in more.values()))
                 for row in rows if row["bench"] == bench]
        if lines:
            out.append(table((bench, "case", "variant", "tok/s", "s", *more), lines))
    return out


def _learning(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in (row for row in rows if row["bench"] == "learning"):
        facts, metrics = row["facts"], row["metrics"]
        said = f"{row['case']}, {facts['model'].rpartition('/')[2]}, {row['variant']}: reward {facts['reward_first']:.3f} -> "
        said += f"{metrics['reward_last']:.3f}"
        if "accuracy_after" in metrics:
            said += f", held-out accuracy {facts['accuracy_before']:.3f} -> {metrics['accuracy_after']:.3f}"
        lines.append(said + (f", {metrics['wall_s']:.0f} s" if "wall_s" in metrics else ""))
    return lines


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)
