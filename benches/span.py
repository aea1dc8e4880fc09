"""What a span costs the host: `python -m benches.span`, in an empty block, while nothing records and under torch.profiler.

`idle` is the price of the ranges that every step carries; a GPU's events and NVTX ranges are not measured here.
"""

from __future__ import annotations

import sys
import timeit

from torch.profiler import ProfilerActivity, profile

from benches import results
from benches.results import Result
from fastlatent.cli import Parser, run_command
from fastlatent.errors import UserError
from fastlatent.profiling import span

NUMBER = 2000
"""Spans in a round."""


def spanned() -> None:
    with span("update/forward"):
        pass


def rounds(count: int) -> list[float]:
    """Seconds of a span in each of `count` rounds, without the call that holds it."""
    empty = min(timeit.repeat(lambda: None, number=NUMBER, repeat=count)) / NUMBER
    return [seconds / NUMBER - empty for seconds in timeit.repeat(spanned, number=NUMBER, repeat=count)]


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m benches.span", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50, metavar="N", help="rounds that count (default: 50)")
    results.add_out(parser)
    args = parser.parse_args(argv)
    if args.rounds < 1:
        raise UserError(f"--rounds: wanted 1 or more, got {args.rounds}")
    machine = results.machine()
    spanned()  # the first of a name is checked against the table
    lines = [Result(bench="span", case="empty block", variant="idle", samples={"wall_s": rounds(args.rounds)})]
    with profile(activities=[ProfilerActivity.CPU]):
        recorded = rounds(min(args.rounds, 5))
    lines.append(Result(bench="span", case="empty block", variant="torch.profiler", samples={"wall_s": recorded}))
    for line in lines:
        low, high = line.spread()["wall_s"]
        print(f"{line.variant:16s} {1e6 * line.metrics()['wall_s']:.3f} us ({1e6 * low:.3f} to {1e6 * high:.3f})")
    print(f"{len(lines)} lines in {results.append(lines, machine, args.out)}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
