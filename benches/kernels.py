"""Every op beside its eager and compiled reference and other libraries' kernels: time, traffic, arithmetic, memory.

    python -m benches.kernels [--op OP] [--backend NAME] [--model qwen2.5-1.5b] [--device cuda] [--csv] [--quick]
                              [--headlines] [--rows N] [--no-compile]
    python -m benches.kernels --ncu OP     one launch for Nsight Compute

Forward, backward and both, at the shapes of the op's `cases.py`: 20th, 50th and 80th percentile of 50 rounds (on a CPU
of those that fit into `--seconds`), GB/s and TFLOP/s of the least traffic and arithmetic, and the share of the roofline
they are. A shape that the roofline itself puts beyond the limit of a CPU is left out, and said so.
"""

from __future__ import annotations

import sys
from argparse import Namespace

import torch
from fastlatent_kernels import OPS

from benches import kernels_cases, kernels_ncu, results
from benches.kernels_bench import DTYPES, Bench
from benches.kernels_cases import MODELS
from fastlatent.cli import Parser, run_command
from fastlatent.errors import UserError


def parsed(argv: list[str]) -> Namespace:
    """The arguments; UserError where one is none of what it may be."""
    parser = Parser(prog="python -m benches.kernels", description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--op", action="append", metavar="OP", help="may be repeated (default: every op)")
    what.add_argument("--ncu", metavar="OP", help="launch its last shape once, for Nsight Compute")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--model", choices=MODELS, help="its width and vocabulary in every shape")
    where.add_argument("--quick", action="store_true", help="a test's shape, 2 rounds; kept only with --out")
    parser.add_argument("--headlines", action="store_true", help="the last shape of each op only")
    parser.add_argument("--rows", type=int, metavar="N",
                        help="leave out shapes of more rows: on a CPU an eager reference of 32768 takes minutes")
    parser.add_argument("--no-compile", action="store_true",
                        help="leave out the compiled reference: compiling it takes longest")
    parser.add_argument("--backend", metavar="NAME", help="the one of ours to measure (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: torch's own choice)")
    parser.add_argument("--seconds", type=float, default=8.0, metavar="S",
                        help="on a CPU, for a shape and direction (default: 8)")
    parser.add_argument("--csv", action="store_true", help="print CSV instead of a table")
    results.add_out(parser)
    args = parser.parse_args(argv)
    ops = [args.ncu] if args.ncu is not None else args.op or sorted(OPS)
    for name in ops:
        if name not in OPS:
            option = "--op" if args.ncu is None else "--ncu"
            raise UserError(f"{option}: {name!r} is not one of {', '.join(sorted(OPS))}")
    args.ops = [OPS[name] for name in ops]
    known = sorted({backend for op in args.ops for backend in op.order} | {"reference"})
    if args.backend is not None and args.backend not in known:
        raise UserError(f"--backend: {args.backend!r} is not one of {', '.join(known)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: there is no CUDA device here")
    if args.device == "cpu" and torch.cuda.is_available():
        raise UserError("--device: to measure the CPU of this machine hide its GPUs (CUDA_VISIBLE_DEVICES=), by which "
                        "lines would be named")
    if args.ncu is not None and args.device != "cuda":
        raise UserError("--ncu: Nsight Compute profiles CUDA kernels, and this would run on the CPU")
    if args.threads is not None and args.threads < 1:
        raise UserError(f"--threads: wanted 1 or more, got {args.threads}")
    if args.rows is not None and args.rows < 1:
        raise UserError(f"--rows: wanted 1 or more, got {args.rows}")
    if not args.seconds > 0:
        raise UserError(f"--seconds: wanted a number above 0, got {args.seconds:g}")
    return args


def main(argv: list[str]) -> None:
    args = parsed(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.ncu is not None:
        (op,) = args.ops
        shape = kernels_cases.shapes(op, args.model, args.quick)[-1]
        case = kernels_cases.make(op, shape, DTYPES[args.dtype], args.device)
        kernels_ncu.launch(case, args.backend or op.chosen(**case.inputs), argv)
        return
    machine, bench, count = results.machine(), Bench(args), 0
    for op in args.ops:
        shapes = bench.shapes(op)
        for shape in shapes:
            found = bench.run(op, shape, shape is shapes[-1])
            if found and (args.out is not None or not args.quick):
                # case by case: a run that is stopped keeps what it has measured
                print(f"{len(found)} lines in {results.append(found, machine, args.out)}", file=sys.stderr)
                count += len(found)
    print(f"{count} lines", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
