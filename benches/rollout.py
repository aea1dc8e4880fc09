"""Tokens per second of our hf engine, with plain tokens and with HRPO's latents, against transformers' `generate`.

    python -m benches.rollout [--engine hf,generate] [--mode discrete,latent] [--batch 32] [--threads N] [--model PATH]

Prompts, weights, dtype, temperature and the cap of 26 tokens are the quickstart's on both sides. Every case is drawn
for groups of 8 and for prompts that all differ, and ends in three ways (`ENDS`). Only drawn tokens count: no pads,
nothing behind a stop, no forced text. `generate` runs as it comes: padded prompts, its own cache, every row carried
along until the last one stops.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

from benches import results, setting
from benches.generate import Generate
from benches.results import Result
from benches.timing import Lap, interleave, seconds
from fastlatent import build
from fastlatent.cli import run_command
from fastlatent.errors import UserError
from fastlatent.rollout.thinking import ThinkingSpan, eos_ids, token_bytes
from fastlatent.schema import AnswerConfig, Config, ThinkingConfig
from fastlatent.types import Request

ENDS = {
    "stops": "a row ends at an EOS or a newline, the quickstart's stops, on both sides",
    "equal": "nothing ends a row: all have as many tokens as the cap allows, on both sides",
    "recipe": "our rows end as the recipe says, with its forced answer; those of generate at an EOS",
}
ENGINES, MODES = ("hf", "generate"), tuple(setting.RECIPES)
GROUP_SIZE = 8

Draw = Callable[[int], int]  # number of the round -> tokens drawn


class OurEngine:
    """The hf engine of one mode; `drawing` says how a case is drawn."""

    def __init__(self, mode: str, args, tokenizer):
        self.config = setting.config(mode, args.model, f"engine.max_batch={args.batch}")
        self.engine = setting.engine(self.config, tokenizer)
        self.spans = {"recipe": self.engine.span}
        # the delimiter still ends the latents, but nothing is forced
        thinking = ThinkingConfig(end=self.config.thinking.end)
        for ends in ("stops", "equal"):
            stops = stop_ids(self.config, tokenizer, ends)
            self.spans[ends] = ThinkingSpan(
                tokenizer, self.engine.model.config.vocab_size, stops, thinking, AnswerConfig(), self.engine.device)

    def drawing(self, requests: Sequence[Request], ends: str) -> Draw:
        sampling = build.sampling_of(self.config)

        def draw(number: int) -> int:
            self.engine.span = self.spans[ends]
            with self.engine.released():
                pass  # it remembers the prompts it has read; generate reads them every time
            rollouts = self.engine.generate([replace(r, step=number) for r in requests], sampling)
            return sum(sum(r.acted) for r in rollouts)

        return draw


class TheirGenerate:
    def __init__(self, args, tokenizer):
        self.config, self.tokenizer = setting.config("discrete", args.model), tokenizer
        self.generate = Generate(self.config, tokenizer)

    def drawing(self, requests: Sequence[Request], ends: str) -> Draw:
        return self.generate.drawing(requests, stop_ids(self.config, self.tokenizer, ends))


def stop_ids(config: Config, tokenizer, ends: str) -> list[int]:
    """The drawn ids that end a row in each of `ENDS`."""
    if ends == "equal":
        return []
    eos = eos_ids(tokenizer)
    if ends == "recipe":
        return eos
    needles = [needle.encode() for needle in config.thinking.stop]
    holding = [i for i, token in enumerate(token_bytes(tokenizer, len(tokenizer))) if any(n in token for n in needles)]
    return sorted({*eos, *holding})


def measure(sides: dict[str, OurEngine | TheirGenerate], args, tokenizer) -> list[Result]:
    config = setting.config("discrete", args.model)
    prompts = setting.prompts(config, tokenizer, args.batch)
    fixed = setting.facts(config) | {"max_new_tokens": config.sampling.max_new_tokens}
    out = []
    for group_size in sorted({GROUP_SIZE, 1}, reverse=True):
        requests = [Request(p, 0, sample) for p in prompts[: args.batch // group_size] for sample in range(group_size)]
        for ends in ENDS:
            case = f"{len(requests) // group_size}x{group_size} {ends}"
            laps = interleave({name: side.drawing(requests, ends) for name, side in sides.items()}, args.rounds)
            facts = fixed | {"batch": len(requests), "group_size": group_size, "ends": ENDS[ends]}
            out += [_result(case, name, laps, facts) for name in sides]
            print("\n".join(_line(result) for result in out[-len(sides):]), flush=True)
    return out


def _result(case: str, name: str, laps: dict[str, list[Lap]], facts: dict) -> Result:
    own = laps[name]
    samples = {"rate_tok_s": [lap.rate for lap in own]} | seconds(own)
    if "generate" in laps and name != "generate":
        samples["speed_over_generate"] = [
            lap.rate / theirs.rate for lap, theirs in zip(own, laps["generate"], strict=True)]
    facts = facts | {"mean_tokens": fmean(lap.work for lap in own)}
    return Result(bench="rollout", case=case, variant=name, samples=samples, facts=facts)


def _line(result: Result) -> str:
    metrics, (low, high) = result.metrics(), result.spread()["rate_tok_s"]
    line = (f"{result.case:14s} {result.variant:12s} {metrics['rate_tok_s']:8.1f} tok/s [{low:.1f}, {high:.1f}] "
            f"{result.facts['mean_tokens']:7.1f} tokens {metrics['wall_s']:7.2f} s {metrics['cpu_s']:7.2f} CPU s")
    return line + (f"  {metrics['speed_over_generate']:.2f} x generate" if "speed_over_generate" in metrics else "")


def _choices(flag: str, words: str, known: Sequence[str]) -> list[str]:
    chosen = words.split(",")
    if odd := [word for word in chosen if word not in known]:
        raise UserError(f"--{flag}: {odd[0]!r} is not one of {', '.join(known)}")
    return [word for word in known if word in chosen]


def main(argv: list[str]) -> None:
    parser = setting.parser("rollout", __doc__, rounds=7)
    parser.add_argument("--engine", default=",".join(ENGINES), help="hf, generate or both (default: both)")
    parser.add_argument("--mode", default=",".join(MODES), help="discrete, latent or both, for hf (default: both)")
    parser.add_argument("--batch", type=int, default=32, metavar="B", help="rows, a multiple of 8 (default: 32)")
    args = parser.parse_args(argv)
    setting.apply(args)
    engines, modes = _choices("engine", args.engine, ENGINES), _choices("mode", args.mode, MODES)
    if args.batch % GROUP_SIZE:
        raise UserError(f"--batch: wanted a multiple of {GROUP_SIZE}, got {args.batch}")
    machine = results.machine()
    tokenizer = build.tokenizer(setting.config("discrete", args.model))
    sides: dict[str, OurEngine | TheirGenerate] = {}
    if "hf" in engines:
        sides |= {f"hf-{mode}": OurEngine(mode, args, tokenizer) for mode in modes}
    if "generate" in engines:
        sides["generate"] = TheirGenerate(args, tokenizer)
    found = measure(sides, args, tokenizer)
    print(f"{len(found)} lines in {results.append(found, machine, args.out)}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
