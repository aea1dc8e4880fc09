"""Train: `python -m fastlatent.train RECIPE [more.yaml ...] [key=value ...]`."""

from __future__ import annotations

import os

# before torch starts its threads: without any spinning a decode step took about a third longer, and with libgomp's own
# amount of it, beside a busy neighbour, ten times as long (two cores)
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

from fastlatent.cli import parse_args, run_command  # noqa: E402


def main(argv: list[str], command: str = "train") -> None:
    """Run a training command, `train` or `sft`."""
    layers, overrides = parse_args(argv, command)
    from fastlatent.config import load_config

    config = load_config(*layers, overrides=overrides)
    if command == "sft":
        from fastlatent.sft.trainer import SftTrainer as Trainer
    else:
        from fastlatent.trainer import Trainer

    Trainer(config, argv).run()


if __name__ == "__main__":
    run_command(main)
