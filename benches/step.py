"""Seconds of one whole HRPO training step, ours and that of the released trainer's loop, re-created.

    python -m benches.step [--batch 64] [--engine hf|vllm] [--threads N] [--model PATH]
    python -m benches.step --against none

A step hands the engine the newest weights, draws groups with latents, scores their texts with the recipe's rewards, and makes
one update with its optimizer step. Both sides have the quickstart's prompts, other ones at every step, its group size, dtype
and temperature; nothing ends a completion before the recipe's cap, so that both draw and learn from as many tokens. Whatever
the rewards are, half of every group then counts as rewarded: no side has completions without an advantage to leave out.

Before anything is timed both learn from the same completions, those of the released loop; where the gradient norms differ
nothing is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Protocol

from benches import results, setting
from benches.results import Result
from benches.timing import Lap, interleave, seconds, wait_for_device
from benches.update import check_same, half_rewarded
from fastlatent import build, evaluation
from fastlatent.cli import run_command
from fastlatent.errors import UserError
from fastlatent.optim import Optimizer
from fastlatent.rewards.pool import RewardPool
from fastlatent.schema import Config
from fastlatent.types import Group, Request, Rollout
from fastlatent.update import Updater

ENGINES = {"hf": (), "vllm": ("engine.kv_cache_gib=1", "engine.gpu_memory_share=0.3")}
"""What draws on our side, and its options; a GPU's memory is shared with two trainers."""


class Step(Protocol):
    rollout_s: float  # of the last call: handing over weights, drawing, scoring

    def __call__(self, requests: Sequence[Request], number: int) -> list[Group]:
        """Make step `number`; the groups that were learnt from."""


class OurStep:
    """What `Trainer` does in a step, without its log; `reward` makes groups of what a step's requests drew."""

    def __init__(self, config: Config, tokenizer, reward: Callable[[list[Rollout]], list[Group]]):
        self.reward, self.rollout_s = reward, 0.0
        self.policy = build.policy(config)
        self.engine = build.engine(config, self.policy, tokenizer)
        self.engine.span = setting.unforced_span(config, tokenizer, self.policy.method.model.vocab_size, [])
        self.update, self.sampling = Updater(self.policy, Optimizer(self.policy, config), config), build.sampling_of(config)

    def __call__(self, requests: Sequence[Request], number: int) -> list[Group]:
        start = perf_counter()
        self.engine.load_weights(self.policy.published(), number)
        groups = self.reward(self.engine.generate(requests, self.sampling))
        wait_for_device()
        self.rollout_s = perf_counter() - start
        with self.engine.released():
            self.update(groups)
        return groups


class Timed:
    """A step as `interleave` runs it; remembers how long each rollout took and what was drawn last."""

    def __init__(self, step: Step, requests: Callable[[int], list[Request]]):
        self.step, self.requests = step, requests
        self.rollouts_s: list[float] = []
        self.facts: dict[str, int] = {}

    def __call__(self, number: int) -> int:
        groups = self.step(self.requests(number), number)
        self.rollouts_s.append(self.step.rollout_s)
        drawn = [r for group in groups for r in group.rollouts]
        self.facts = {"acted_tokens": sum(sum(r.acted) for r in drawn), "latent_tokens": sum(sum(r.latent) for r in drawn)}
        return self.facts["acted_tokens"]


def run(args, folder: Path) -> list[Result]:
    config = setting.config(
        "latent", args.model, f"engine.name={args.engine}", f"engine.max_batch={args.batch}", *ENGINES[args.engine])
    if args.batch % config.group_size:
        raise UserError(f"--batch: wanted a multiple of {config.group_size}, got {args.batch}")
    build.check_model(config)
    tokenizer, num_prompts = build.tokenizer(config), args.batch // config.group_size
    prompts = setting.prompts(config, tokenizer, num_prompts * (1 + args.rounds))

    def requests(number: int) -> list[Request]:
        chosen = prompts[number * num_prompts : (number + 1) * num_prompts]
        return [Request(prompt, number, sample) for prompt in chosen for sample in range(config.group_size)]

    facts = setting.facts(config) | {
        "batch": args.batch, "group_size": config.group_size, "max_new_tokens": config.sampling.max_new_tokens}
    with RewardPool(config.rewards) as pool:
        reward = partial(rewarded, config=config, tokenizer=tokenizer, pool=pool)
        ours = OurStep(config, tokenizer, reward)
        steps: dict[str, Step] = {f"{args.engine}-hrpo": ours}
        if args.against == "released":
            from benches.released_step import ReleasedStep  # trl is heavy

            steps["released"] = released = ReleasedStep(config, tokenizer, args.batch, folder, reward)
            facts["trl"] = metadata.version("trl")
            groups, drawn = released.draw(requests(0), 0)
            check_same(ours.update(groups).grad_norm, released.learn(groups, drawn), setting.dtype(config))
        timed = {name: Timed(step, requests) for name, step in steps.items()}
        laps = interleave(timed, args.rounds)
    return [_result(name, timed[name], laps, facts) for name in steps]


def rewarded(rollouts: list[Rollout], *, config: Config, tokenizer, pool: RewardPool) -> list[Group]:
    """Score the texts with the recipe's rewards, as a step must; then half of every group counts as rewarded."""
    evaluation.score(rollouts, tokenizer, pool, config.thinking.end)
    return half_rewarded(rollouts, config)


def _result(name: str, timed: Timed, laps: dict[str, list[Lap]], facts: dict) -> Result:
    own, theirs = laps[name], laps.get("released")
    samples = seconds(own) | {"rollout_s": timed.rollouts_s[-len(own):], "rate_tok_s": [lap.rate for lap in own]}
    if theirs is not None and theirs is not own:
        samples["speed_over_released"] = [t.wall_s / o.wall_s for o, t in zip(own, theirs, strict=True)]
    case = f"{facts['batch'] // facts['group_size']}x{facts['group_size']} of {facts['max_new_tokens']} tokens"
    return Result(bench="step", case=case, variant=name, samples=samples, facts=facts | timed.facts)


def _line(result: Result) -> str:
    metrics, (low, high) = result.metrics(), result.spread()["wall_s"]
    ratio = f"  {metrics['speed_over_released']:.2f} x the released loop's speed" if "speed_over_released" in metrics else ""
    return (f"{result.case:18s} {result.variant:10s} {metrics['wall_s']:7.3f} s [{low:.3f}, {high:.3f}] of which rollout "
            f"{metrics['rollout_s']:7.3f} s {metrics['cpu_s']:7.3f} CPU s {metrics['rate_tok_s']:8.1f} tok/s{ratio}")


def main(argv: list[str]) -> None:
    parser = setting.parser("step", __doc__, rounds=5)
    parser.add_argument("--batch", type=int, default=64, metavar="B", help="completions, in groups of 8 (default: 64)")
    parser.add_argument("--engine", choices=tuple(ENGINES), default="hf", help="what draws on our side (default: hf)")
    parser.add_argument("--against", choices=("released", "none"), default="released", help="the rival (default: released)")
    args = parser.parse_args(argv)
    setting.apply(args)
    machine = results.machine()
    with TemporaryDirectory() as folder:
        found = run(args, Path(folder))
    print("\n".join(map(_line, found)))
    print(f"{len(found)} lines in {results.append(found, machine, args.out)}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
