"""Tokens per second of our engines, with plain tokens and with HRPO's latents, against transformers' `generate`.

    python -m benches.rollout [--engine vllm,hf,loop,generate] [--mode discrete,hrpo_topk,hrpo_full] [--batch 16,64]
                              [--ends stops,equal,recipe] [--threads N] [--model PATH]

Prompts, weights, dtype, temperature and the cap of 26 tokens are the quickstart's on all sides. Every case is drawn
for groups of 8 and for prompts that all differ, and ends in three ways (`ENDS`). Only drawn tokens count: no pads,
nothing behind a stop, no forced text. `generate` runs as it comes: padded prompts, its own cache, every row carried
along until the last one stops. `hrpo_topk` mixes the published 50 likeliest tokens, `hrpo_full` the whole vocabulary; the
latter multiplies with the head's size twice, so its bound beside plain tokens is (body + head) / (body + 2 head). `loop` is a
plain transformers loop with the same latents (`benches/latent_loop.py`). Each line also says what one decode step asks of the
host and the device (`benches/steps.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean

import torch

from benches import results, setting
from benches.generate import Generate
from benches.latent_loop import LatentLoop
from benches.results import Result
from benches.steps import PerStep, per_step
from benches.timing import Lap, interleave, seconds
from fastlatent import build, models
from fastlatent.cli import run_command
from fastlatent.errors import UserError
from fastlatent.rollout.thinking import eos_ids, token_bytes
from fastlatent.schema import Config
from fastlatent.types import Request

ENDS = {
    "stops": "a row ends at an EOS or a newline, the quickstart's stops, on both sides",
    "equal": "nothing ends a row: all have as many tokens as the cap allows, on both sides",
    "recipe": "our rows end as the recipe says, with its forced answer; those of generate at an EOS",
}
MODES = {
    "discrete": ("discrete",), "hrpo_topk": ("latent", "sampling.top_k=50", "model.freeze_embedding=true"),
    "hrpo_full": ("latent",)}
"""The recipe of each mode, and what is different in it."""
OURS = {"hf": ("engine.name=hf", "engine.max_batch={batch}"),
        # an engine a mode, all in this process: on a GPU they share its memory, and vLLM lets only one of them sleep. None is
        # closed, for that would end vLLM's process groups for all
        "vllm": ("engine.name=vllm", "engine.max_batch={batch}", "engine.kv_cache_gib=1", "engine.sleep=false",
                 "engine.gpu_memory_share={share}")}
ENGINES = (*OURS, "loop", "generate")
GROUP_SIZE = 8

Draw = Callable[[int], int]  # number of the round -> tokens drawn


class OurEngine:
    """One engine of one mode; `drawing` says how a case is drawn."""

    def __init__(self, engine: str, mode: str, args, tokenizer):
        recipe, *overrides = MODES[mode]
        share = round(0.6 / len(args.mode.split(",")), 2)
        overrides += [word.format(batch=max(args.batches), share=share) for word in OURS[engine]]
        self.config = setting.config(recipe, args.model, *overrides)
        self.engine = setting.engine(self.config, tokenizer)
        self.spans = {"recipe": self.engine.span}
        for ends in ("stops", "equal"):
            stops = stop_ids(self.config, tokenizer, ends)
            self.spans[ends] = setting.unforced_span(self.config, tokenizer, self.engine.method.model.vocab_size, stops)

    def drawing(self, requests: Sequence[Request], ends: str, max_new: int | None = None) -> Draw:
        sampling = build.sampling_of(self.config)
        sampling = replace(sampling, max_new_tokens=max_new or sampling.max_new_tokens)

        def draw(number: int) -> int:
            self.engine.span = self.spans[ends]
            with self.engine.released():
                pass  # it remembers the prompts it has read; generate reads them every time
            rollouts = self.engine.generate([replace(r, step=number) for r in requests], sampling)
            return sum(sum(r.acted) for r in rollouts)

        return draw


class Plain:
    """A loop of transformers: its own `generate`, or the latents of a mode step by step."""

    def __init__(self, make: type[Generate] | type[LatentLoop], mode: str, args, tokenizer):
        recipe, *overrides = MODES[mode]
        self.config, self.tokenizer = setting.config(recipe, args.model, *overrides), tokenizer
        self.loop = make(self.config, tokenizer)

    def drawing(self, requests: Sequence[Request], ends: str, max_new: int | None = None) -> Draw:
        return self.loop.drawing(requests, stop_ids(self.config, self.tokenizer, ends), max_new)


Sides = dict[str, OurEngine | Plain]


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


def measure(sides: Sides, batch: int, args, tokenizer, steps: dict[str, PerStep]) -> Iterator[list[Result]]:
    """The lines of one case after the other; `steps`, by side, is filled in after the first one is timed."""
    config = setting.config("discrete", args.model)
    prompts = setting.prompts(config, tokenizer, batch)
    fixed = setting.facts(config) | {"max_new_tokens": config.sampling.max_new_tokens}
    for group_size in sorted({GROUP_SIZE, 1} if batch % GROUP_SIZE == 0 else {1}, reverse=True):
        requests = [Request(p, 0, sample) for p in prompts[: batch // group_size] for sample in range(group_size)]
        for ends in args.ends:
            case = f"{len(requests) // group_size}x{group_size} {ends}"
            laps = interleave({name: side.drawing(requests, ends) for name, side in sides.items()}, args.rounds)
            if not steps:  # once: a step's operators do not depend on its rows
                steps |= dict(_steps(sides, requests[:GROUP_SIZE], build.device_of(config)))
            facts = fixed | {"batch": len(requests), "group_size": group_size, "ends": ENDS[ends]}
            found = []
            for name in sides:
                cost = steps.get(name)
                found.append(_result(case, name, laps, facts | (cost.facts() if cost else {}), config))
                print(f"{_line(found[-1])}  {cost.line() if cost else ''}", flush=True)
            yield found


def _steps(sides: Sides, requests: Sequence[Request], device: torch.device) -> Iterator[tuple[str, PerStep]]:
    for name, side in sides.items():
        try:
            yield name, per_step(partial(side.drawing, requests, "equal"), device)
        except RuntimeError as error:  # compiled code need not bear being watched; what was timed is kept
            print(f"{name}: what a step costs was not counted: {error}", file=sys.stderr)


def bound(config: Config, mode: str) -> float:
    """The most that a mode can reach of the speed of plain tokens, by its multiplications alone."""
    if mode != "hrpo_full":
        return 1.0
    shape = models.skeleton(models.resolve_model(config.model.path), config.model.trust_remote_code)
    head = shape.lm_head.weight.numel()
    body = sum(p.numel() for p in shape.model.layers.parameters())
    return (body + head) / (body + 2 * head)


def _result(case: str, name: str, laps: dict[str, list[Lap]], facts: dict, config: Config) -> Result:
    own, (engine, _, mode) = laps[name], name.partition("-")
    samples = {"rate_tok_s": [lap.rate for lap in own]} | seconds(own)
    rivals = {"speed_over_generate": "generate", "speed_over_loop": f"loop-{mode}", "speed_over_hf": f"hf-{mode}",
              "speed_over_discrete": f"{engine}-discrete"}
    for metric, rival in rivals.items():
        if rival in laps and rival != name and mode:
            samples[metric] = [lap.rate / theirs.rate for lap, theirs in zip(own, laps[rival], strict=True)]
    facts = facts | {"mean_tokens": fmean(lap.work for lap in own)}
    if mode:
        facts["bound_over_discrete"] = round(bound(config, mode), 4)
    return Result(bench="rollout", case=case, variant=name, samples=samples, facts=facts)


def _line(result: Result) -> str:
    metrics, (low, high) = result.metrics(), result.spread()["rate_tok_s"]
    line = (f"{result.case:14s} {result.variant:14s} {metrics['rate_tok_s']:8.1f} tok/s [{low:.1f}, {high:.1f}] "
            f"{result.facts['mean_tokens']:7.1f} tokens {metrics['wall_s']:7.2f} s {metrics['cpu_s']:7.2f} CPU s")
    ratios = {name.removeprefix("speed_over_"): value for name, value in metrics.items() if name.startswith("speed_over_")}
    return line + "".join(f"  {value:.2f} x {name}" for name, value in ratios.items())


def _choices(flag: str, words: str, known: Iterable[str]) -> list[str]:
    chosen = words.split(",")
    if odd := [word for word in chosen if word not in known]:
        raise UserError(f"--{flag}: {odd[0]!r} is not one of {', '.join(known)}")
    return [word for word in known if word in chosen]


def _batches(words: str) -> list[int]:
    try:
        sizes = [int(word) for word in words.split(",")]
    except ValueError:
        raise UserError(f"--batch: wanted whole numbers with commas between them, got {words!r}") from None
    if min(sizes) < 1:
        raise UserError(f"--batch: wanted 1 or more, got {words}")
    return sizes


def main(argv: list[str]) -> None:
    parser = setting.parser("rollout", __doc__, rounds=7)
    for flag, known, default in (("engine", ENGINES, "hf,generate"), ("mode", MODES, "discrete,hrpo_full"),
                                 ("ends", ENDS, ",".join(ENDS))):
        parser.add_argument(f"--{flag}", default=default, help=f"any of {', '.join(known)} (default: {default})")
    parser.add_argument("--batch", dest="batches", default="32", metavar="B",
                        help="rows, several with commas; groups of 8 where it is a multiple (default: 32)")
    args = parser.parse_args(argv)
    args.batches = _batches(args.batches)
    setting.apply(args)
    engines, modes = _choices("engine", args.engine, ENGINES), _choices("mode", args.mode, MODES)
    args.ends = _choices("ends", args.ends, ENDS)
    machine = results.machine()
    tokenizer = build.tokenizer(setting.config("discrete", args.model))
    sides: Sides = {
        f"{engine}-{mode}": OurEngine(engine, mode, args, tokenizer) for engine in engines if engine in OURS for mode in modes}
    if "loop" in engines:
        sides |= {f"loop-{mode}": Plain(LatentLoop, mode, args, tokenizer) for mode in modes if mode != "discrete"}
    if "generate" in engines:
        sides["generate"] = Plain(Generate, "discrete", args, tokenizer)
    steps: dict[str, PerStep] = {}
    for batch in args.batches:
        for found in measure(sides, batch, args, tokenizer, steps):
            # case by case: a run that is stopped keeps what it has measured
            print(f"{len(found)} lines in {results.append(found, machine, args.out)}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
