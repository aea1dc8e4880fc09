"""`benches/gpu.sh`: the arguments, the order and the clock of the battery, and what is kept of it (see there).

Standard library only: nothing of the project can be imported before its build.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn

from benches import gpu_needs, gpu_parts
from benches.gpu_parts import PARTS, ROOT, Place
from benches.gpu_steps import FAILED, STOPPED, Outcome, Step, run
from benches.gpu_summary import summary

PART_S = 540.0
"""Longest a part may take."""

KEPT = ("parts.jsonl", "results.jsonl")
"""Files of `out` that go on from one call to the next."""

TEST_LINE = re.compile(r"(PASSED|FAILED|ERROR|SKIPPED) .*?(tests/\S+)|(tests/\S+) (PASSED|FAILED|ERROR|SKIPPED)")
"""A line of pytest -v, of one process or of several."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="benches/gpu.sh", description="Build, test and measure everything on one GPU, without a network.")
    parser.add_argument("--part", action="append", choices=(*PARTS, "none"),
                        help="may be repeated (default: all, in the order of value); none: only --keep")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                        help="cpu: small sizes, to test the battery itself")
    parser.add_argument("--minutes", type=float, default=27.0, metavar="N", help="begin nothing after these (default: 27)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="DIR", help="six files (default: runs/gpu)")
    parser.add_argument("--store", type=Path, default=Path("~/.cache/fastlatent-gpu"), metavar="DIR",
                        help="what lasts from call to call: carried pieces, build, models (default: ~/.cache/fastlatent-gpu)")
    parser.add_argument("--keep", action="append", type=Path, default=[], metavar="PIECE",
                        help="put this folder, one that --pack made, into the store first")
    parser.add_argument("--commit", help="of this checkout, where git cannot tell")
    parser.add_argument("--needs", action="store_true", help="what must be carried, and whether it is here")
    parser.add_argument("--pack", type=Path, metavar="DIR", help="fetch it into DIR/1, DIR/2, ...; needs a network")
    parser.add_argument("--also", default="", metavar="NAMES", help="packages to pack that are usually there, by comma")
    parser.add_argument("--python", metavar="3.12", help="the Python to pack for (default: this one)")
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        raise ValueError(f"--minutes: wanted a number above 0, got {args.minutes:g}")
    args.out, args.store = (path.expanduser().resolve() for path in (args.out, args.store))
    return args


def main(argv: Sequence[str]) -> int:
    try:
        args = parsed(argv)
        if args.needs:
            print(gpu_needs.table(args.store))
            return 0
        if args.pack is not None:
            for piece in gpu_needs.pack(args.pack, [name for name in args.also.split(",") if name], args.python):
                names = ", ".join(sorted(file.name for file in piece.iterdir()))
                print(f"{piece}: {sum(file.stat().st_size for file in piece.iterdir()) / 1e6:.1f} MB: {names}")
            return 0
        for piece in args.keep:
            gpu_needs.keep(piece, args.store)
        chosen = [part for part in PARTS if part in (args.part or PARTS)]
        if not chosen:
            return 0
        if "build" not in chosen and not gpu_parts.is_built(args.store):
            raise ValueError(f"--part: nothing is built in {args.store} yet; begin with --part build, which takes "
                             "seconds where it is")
        if args.device == "cuda" and not gpu_parts.has_gpu():
            raise ValueError("--device: torch sees no GPU here; --device cpu runs every part at small sizes")
        return battery(Place(args.device, args.out, args.store), chosen, args.minutes * 60, args.commit)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def battery(at: Place, chosen: Sequence[str], budget_s: float, commit: str | None) -> int:
    """Run the parts while there is time; 1 where a step failed."""
    start = monotonic()
    at.out.mkdir(parents=True, exist_ok=True)
    at.store.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        if (at.store / name).is_file():
            shutil.copy(at.store / name, at.out / name)
    os.environ.update(environment(at, commit))
    os.chdir(ROOT)
    has_failed = False
    for part in chosen:
        until = min(monotonic() + PART_S, start + budget_s)
        print(f"\n==== {part}", flush=True)
        for step in PARTS[part](at):
            has_failed |= _attempt(part, step, at, until)
    print((at.out / "summary.md").read_text())
    return int(has_failed)


def _attempt(part: str, step: Step, at: Place, until: float) -> bool:
    """Run a step and, where it comes to nothing, what is to be tried instead; whether nothing helped."""
    outcome = run(step, at.out, until - monotonic())
    _record(part, step, outcome, at)
    if step.retry is not None and outcome.status in (FAILED, STOPPED):
        return _attempt(part, step.retry, at, until)
    return outcome.status == FAILED


def _record(part: str, step: Step, outcome: Outcome, at: Place) -> None:
    """A line in parts.jsonl, and a summary that knows of it: whoever ends this process finds both."""
    row = {"part": part, "step": step.name, "status": outcome.status, "seconds": round(outcome.seconds, 1),
           "note": outcome.note,
           "details": details(outcome.lines), "device": at.device, "commit": os.environ["FASTLATENT_COMMIT"] or None,
           "time": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    with open(at.out / "parts.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    for name in KEPT:
        if (at.out / name).is_file():
            shutil.copy(at.out / name, at.store / name)
    (at.out / "summary.md").write_text(summary(_rows(at.out / "parts.jsonl"), _rows(at.results)))
    mark = f": {outcome.note}" if outcome.note else ""
    print(f"---- {part}: {step.name}: {outcome.status} after {outcome.seconds:.0f} s{mark}", flush=True)


def details(lines: Sequence[str]) -> dict[str, Any]:
    """What a summary needs of a step's output: tests by outcome and dtype, what failed, what a checker found."""
    counts: Counter[str] = Counter()
    bad: list[str] = []
    for line in lines:
        if found := TEST_LINE.search(line):
            status, node = (found[1], found[2]) if found[1] else (found[4], found[3])
            dtype = next((name for name in ("float32", "bfloat16") if f"torch.{name}" in node), "other")
            counts[f"{dtype} {status.lower()}"] += 1
            if status in ("FAILED", "ERROR") and node not in bad:
                bad.append(node)
    said = [line.strip("= ") for line in lines if line.startswith("=========") and ("SUMMARY" in line or "Error: " in line)]
    ran = [line for line in lines if line.startswith("on ")]  # of benches.every_kernel
    return {name: value for name, value in (
        ("tests", dict(counts)), ("failed", bad[:40]), ("checker", said[-12:]), ("ran", ran)) if value}


def environment(at: Place, commit: str | None) -> dict[str, str]:
    """Variables of every command: no network, the store's model and wheels, the commit, and no GPU where none is asked for."""
    out = {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(at.store / "wheels"),
           "FASTLATENT_CACHE": str(at.store / "cache"), "FASTLATENT_COMMIT": commit or _commit(), "PYTHONUNBUFFERED": "1",
           "TOKENIZERS_PARALLELISM": "false"}
    if at.is_cuda:
        out["CUDACXX"] = os.environ.get("CUDACXX") or gpu_parts.tool_path("nvcc")
    else:
        out["CUDA_VISIBLE_DEVICES"] = ""
    return out


def _commit() -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; the last may have been cut off by a limit."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
