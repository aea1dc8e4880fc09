"""`python -m fastlatent.models`: fetch the quickstart model ahead of its first use and print its folder."""

from fastlatent.cli import Parser, run_command
from fastlatent.models.smollm2 import fetch


def main(argv: list[str]) -> None:
    Parser(prog="python -m fastlatent.models", description=__doc__).parse_args(argv)
    print(fetch())


if __name__ == "__main__":
    run_command(main)
