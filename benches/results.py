"""Results on file: a JSON line for each variant measured, in `baselines/<hardware>.jsonl`, with what may explain it.

    {"bench": "rollout", "case": "4x8 equal", "variant": "hf-hrpo_topk", "metrics": {"rate_tok_s": ...},
     "spread": {...}, "facts": {...}, "git": {...}, "hardware": {...}, "versions": {...}, "threads": {...},
     "load": [...], "time": "..."}
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from fastlatent import manifest
from fastlatent.errors import UserError

BASELINES = Path(__file__).parent / "baselines"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@dataclass(kw_only=True, slots=True)
class Result:
    """One variant of one case. A metric's name ends in its unit; seconds and bytes are better low, all others high."""

    bench: str
    case: str
    variant: str
    samples: dict[str, list[float]]  # metric -> its value in every round
    facts: dict[str, Any] = field(default_factory=dict)  # what was measured, and numbers that are neither good nor bad

    def metrics(self) -> dict[str, float]:
        """The median of every metric."""
        return {name: _rounded(median(values)) for name, values in self.samples.items()}

    def spread(self) -> dict[str, list[float]]:
        """The 20th and 80th percentile of every metric."""
        return {name: [_rounded(q) for q in np.quantile(values, [0.2, 0.8])] for name, values in self.samples.items()}


def _rounded(value: float) -> float:
    """Five digits: more than any measurement here has."""
    return float(f"{value:.5g}")


def machine() -> dict[str, Any]:
    """Where and with what this process measures; to be asked before measuring, for the load average."""
    return {
        "git": git_state(),
        "hardware": manifest.hardware(),
        "versions": manifest.versions(),
        "threads": {"torch": torch.get_num_threads()} | {name: os.environ.get(name) for name in THREAD_VARIABLES},
        "load": [round(value, 2) for value in os.getloadavg()],
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def git_state(root: Path = BASELINES.parents[1]) -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout at `root`, as in a run's manifest; new baselines make nothing dirty.

    Where git cannot tell, as in a copy without history, the commit is that of FASTLATENT_COMMIT, and `dirty` None.
    """
    state = manifest.git_state(root / "fastlatent")
    if state is None:
        told = os.environ.get("FASTLATENT_COMMIT")
        return {"commit": told, "dirty": None} if told else None
    command = ["git", "-C", str(root), "status", "--porcelain", "--", ".", ":(exclude)benches/baselines"]
    changed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout
    return state | {"dirty": bool(changed)}


def add_out(parser: ArgumentParser) -> None:
    """The argument that every benchmark has."""
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="where the lines go (default: benches/baselines/<hardware>.jsonl)")


def append(results: Sequence[Result], machine: Mapping[str, Any], out: Path | None = None) -> Path:
    """Write a line for each result and return the file: `out`, or the one of `machine`'s hardware in `baselines/`."""
    path = out or BASELINES / f"{hardware_name(machine['hardware'])}.jsonl"
    rows = [{"bench": r.bench, "case": r.case, "variant": r.variant, "metrics": r.metrics(), "spread": r.spread(),
             "facts": r.facts, **machine} for r in results]
    lines = [json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.write("".join(lines))
    except OSError as error:
        raise UserError(f"--out: cannot write {path}: {error.strerror}") from None
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of results; UserError where one is none."""
    rows = []
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a file of benchmark results") from None
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
            row["bench"], row["case"], row["variant"], row["metrics"]  # what every line must have
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}: not a benchmark result") from None
        rows.append(row)
    return rows


def hardware_name(hardware: Mapping[str, Any]) -> str:
    """A file name for what was measured on: the GPU, or the CPU with its number of cores."""
    gpus = hardware["gpus"]
    name = f"{len(gpus)}x {gpus[0]}" if gpus else f"{hardware['cpu']} {hardware['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
