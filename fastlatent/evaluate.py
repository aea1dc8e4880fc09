"""Score a trained run on a file: `python -m fastlatent.evaluate RUN --data FILE` prints accuracy, pass@k with 95 percent
intervals, lengths and the latent share, and writes every sample to a jsonl file. Right is what the first reward gives 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from fastlatent import build, evaluation
from fastlatent.cli import Parser, check_writable, run_command
from fastlatent.data.base import DATASETS, Example
from fastlatent.data.chat import make_prompt
from fastlatent.data.rows import RowsConfig
from fastlatent.errors import UserError
from fastlatent.evaluation import Sample
from fastlatent.log import json_line
from fastlatent.rewards.pool import RewardPool
from fastlatent.rollout.failure import kept_in
from fastlatent.schema import Config
from fastlatent.step_metrics import sample_row
from fastlatent.trained import add_arguments, add_engine, check_samples, open_run, run_config


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased chance that at least one of k samples is right: 1 - C(n - c, k) / C(n, k) (arXiv:2107.03374, section 2.1)."""
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 percent interval of a mean over questions of values from 0 to 1: the means p for which theirs is at most 1.96
    standard errors sqrt(p (1 - p) / n) away (Wilson 1927). Values that are shares vary less than p (1 - p), and it is too wide
    for them, never too narrow; where all answers are right it does not claim that none could be wrong."""
    n, mean, z2 = len(values), fmean(values), 1.96**2
    half = math.sqrt(z2 * mean * (1 - mean) / n + (z2 / (2 * n)) ** 2)
    low, high = ((mean + z2 / (2 * n) + sign * half) / (1 + z2 / n) for sign in (-1, 1))
    return max(0.0, min(low, mean)), min(1.0, max(high, mean))  # at 0 and 1 rounding could leave the mean outside


def report(samples: Sequence[Sample], num_samples: int) -> list[str]:
    """The printed table; `samples` holds `num_samples` siblings a question, side by side."""
    groups = [samples[i : i + num_samples] for i in range(0, len(samples), num_samples)]
    correct = [sum(s.is_correct for s in group) for group in groups]
    lines = [f"questions {len(groups)}, samples per question {num_samples}"]
    k = 1
    while k <= num_samples:
        values = [pass_at_k(num_samples, c, k) for c in correct]
        name = "accuracy" if num_samples == 1 else f"pass@{k}"
        low, high = interval(values)
        lines.append(f"{name:9s} {fmean(values):.4f}, 95% interval {low:.4f} to {high:.4f}")
        k *= 2
    rollouts = [s.rollout for s in samples]
    lengths = [len(r.token_ids) for r in rollouts]
    lines.append(f"length    {fmean(lengths):.1f} tokens, {fmean(r.num_thinking for r in rollouts):.1f} thinking, "
                 f"{100 * fmean(r.finish == 'length' for r in rollouts):.1f}% cut")
    lines.append(f"latent    {100 * sum(sum(r.latent) for r in rollouts) / sum(lengths):.1f}% of the tokens read")
    return lines


def _examples(config: Config, path: str | None, limit: int) -> Sequence[Example]:
    """Rows of FILE by the run's own column names, or the run's held-out data."""
    if path is None:
        examples = build.dataset(config).held_out
    else:
        member = DATASETS.find("jsonl", "data.name")
        names = ("question", "answer", "answer_after") if isinstance(config.data, RowsConfig) else ()
        columns = {name: getattr(config.data, name) for name in names}
        examples = member(member.Config(train=path, **columns), config.seed).train
    if not len(examples):
        raise UserError("--data: the run has no held-out data of its own; wanted --data FILE")
    return [examples[i] for i in range(min(len(examples), limit or len(examples)))]


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m fastlatent.evaluate", description=__doc__)
    add_arguments(parser)
    add_engine(parser)
    parser.add_argument("--data", metavar="FILE", help="jsonl file (default: the run's held-out data)")
    parser.add_argument("--samples", type=int, default=0, help="samples per question; 0 is one greedy completion")
    parser.add_argument("--limit", type=int, default=0, help="only the first N questions")
    parser.add_argument("--out", metavar="FILE", help="where the samples go (default: RUN/evaluation-<step>.jsonl)")
    args = parser.parse_args(argv)
    check_samples(args.samples)
    if args.limit < 0:
        raise UserError(f"--limit: wanted 0 or more, got {args.limit}")
    if args.data and not Path(args.data).is_file():
        raise UserError(f"--data: {args.data}: no such file")
    if args.out and not Path(args.out).parent.is_dir():
        raise UserError(f"--out: {Path(args.out).parent} is no folder")
    config = run_config(args.run, args.device, args.engine)
    build.check_model(config)
    check_writable("--out", Path(args.out or Path(args.run) / "evaluation.jsonl"))
    tokenizer = build.tokenizer(config)
    prompts = [make_prompt(tokenizer, example, config.chat) for example in _examples(config, args.data, args.limit)]
    with RewardPool(config.rewards, columns=set(prompts[0].columns)) as pool:
        trained = open_run(args.run, args.checkpoint, args.device, args.engine)
        with kept_in(Path(args.run)):
            samples = evaluation.evaluate(
                trained.engine(), prompts, build.sampling_of(config, greedy=not args.samples), args.samples or 1, tokenizer,
                pool, config.thinking.end)
    missing = evaluation.missing_lines(samples, pool.report)
    print("\n".join([f"checkpoint {trained.path}", *report(samples, args.samples or 1), *missing]))
    out = Path(args.out or Path(args.run) / f"evaluation-{trained.step:06d}.jsonl")
    try:
        out.write_bytes(b"".join(json_line(sample_row(trained.step, s)) for s in samples))
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error.strerror})") from None
    print(f"samples   {out}")


if __name__ == "__main__":
    run_command(main)
