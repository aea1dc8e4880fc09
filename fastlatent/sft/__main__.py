"""`python -m fastlatent.sft`: the command of `fastlatent.train`, over demonstrations."""

from __future__ import annotations

from fastlatent import train
from fastlatent.cli import run_command


def main(argv: list[str]) -> None:
    train.main(argv, "sft")


if __name__ == "__main__":
    run_command(main)
