"""Train: `python -m fastlatent.train RECIPE [more.yaml ...] [key=value ...]`."""

from __future__ import annotations

import os
import sys

# before torch starts its threads: two of them spinning beside a busy neighbour cost ten times the work
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from fastlatent.cli import parse_args, run_command  # noqa: E402


def main(argv: list[str]) -> int:
    layers, overrides = parse_args(argv)
    from fastlatent.config import load_config

    config = load_config(*layers, overrides=overrides)
    from fastlatent.guard import TrainingDiverged
    from fastlatent.trainer import Trainer

    try:
        Trainer(config, argv).run()
    except TrainingDiverged as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_command(main)
