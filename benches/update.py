"""Seconds and memory of one policy update, ours and trl's, on the same completions.

    python -m benches.update [--batch 64] [--threads N] [--model PATH]
    python -m benches.update --against none --length 480 --batch 32 --tokens-per-microbatch 20000

The untrained quickstart model draws `--batch` completions with latents; an update is loss, backward, clip and a step
of fused AdamW. `latent` learns from them as they were drawn, through the method's embedding; `discrete` and `trl`
from their tokens alone. Half of every group is rewarded, so that no completion can be left out for having no
advantage. Drawn tokens that the engine replaced are no actions on any side: trl's tensors have one id for what was
drawn and what is read.

Before anything is timed the gradient norms of `discrete` and `trl` are compared; where they differ nothing is timed.

With `--length` nothing ends a completion before that many tokens, which is what training on long texts is like. On GPUs whose
peak is known (fastlatent/mfu.py) our lines say which share of it the model's own operations were.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from benches import results, setting
from benches.memory import peak_bytes
from benches.results import Result
from benches.timing import Lap, interleave, seconds
from fastlatent import advantages, build, mfu
from fastlatent.cli import run_command
from fastlatent.errors import UserError
from fastlatent.optim import Optimizer
from fastlatent.packing import Item, microbatches, pack
from fastlatent.policy import Policy
from fastlatent.schema import Config
from fastlatent.types import Group, Request, Rollout
from fastlatent.update import Updater

Update = Callable[[], Tensor]  # makes one update and returns the norm of its gradient

NORM_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest relative difference of two gradient norms that are the same but for rounding."""


def draw(config: Config, tokenizer, batch: int, is_endless: bool = False) -> list[Group]:
    """Groups of completions of the recipe's engine, half of each rewarded; `is_endless`: each as long as it may be."""
    prompts = setting.prompts(config, tokenizer, batch // config.group_size)
    engine = setting.engine(config, tokenizer)
    if is_endless:
        engine.span = setting.unforced_span(config, tokenizer, engine.model.config.vocab_size, [])
    requests = [Request(p, 0, sample) for p in prompts for sample in range(config.group_size)]
    rollouts = engine.generate(requests, build.sampling_of(config))
    for r in rollouts:
        places = zip(r.acted, r.token_ids, r.target_ids, strict=True)
        r.acted = [acted and read == drawn for acted, read, drawn in places]
    return half_rewarded(rollouts, config)


def half_rewarded(rollouts: Sequence[Rollout], config: Config) -> list[Group]:
    """Groups of them in which every second one is rewarded."""
    def group(siblings: list[Rollout]) -> Group:
        out = Group(siblings, torch.arange(len(siblings), dtype=torch.float64) % 2, {})
        out.advantage_G = advantages.of_group(out, config.objective)
        return out

    return [group(list(rollouts[i : i + config.group_size])) for i in range(0, len(rollouts), config.group_size)]


def without_latents(groups: Sequence[Group]) -> list[Group]:
    """The same tokens, none of them read as a latent."""
    def plain(rollout: Rollout) -> Rollout:
        return replace(rollout, latent=[False] * len(rollout.latent), trace=None)

    return [replace(group, rollouts=[plain(r) for r in group.rollouts]) for group in groups]


def our_update(config: Config, groups: Sequence[Group], policy: Policy) -> Update:
    updater = Updater(policy, Optimizer(policy, config), config)
    return lambda: updater(groups).grad_norm


def check_same(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    """Raise unless two gradient norms agree."""
    difference = abs(float(ours) / float(theirs) - 1)
    if not difference <= NORM_TOLERANCE[dtype]:
        norms = f"{float(ours):.6g} (ours) and {float(theirs):.6g} (trl)"
        raise RuntimeError(f"the two updates differ: gradient norms {norms}")


def _counting(update: Update, num_tokens: int) -> Callable[[int], int]:
    def run(_: int) -> int:
        update()
        return num_tokens

    return run


def _result(name: str, laps: dict[str, list[Lap]], peaks: dict[str, int | None], facts: dict,
            peak_flop_s: float | None) -> Result:
    own, theirs = laps[name], laps.get("trl")
    samples = seconds(own) | {"rate_tok_s": [lap.rate for lap in own]}
    if peaks[name] is not None:
        samples["peak_bytes"] = [float(peaks[name])]
    if name != "trl" and peak_flop_s is not None and facts["model_flops"] is not None:
        samples["mfu_share"] = [facts["model_flops"] / lap.wall_s / peak_flop_s for lap in own]
    if name != "trl" and theirs is not None:
        samples["speed_over_trl"] = [t.wall_s / o.wall_s for o, t in zip(own, theirs, strict=True)]
    length = f" of {facts['length']} tokens" if facts["length"] is not None else ""
    case = ", ".join([f"{facts['completions']} completions{length}", *facts["changes"]])
    return Result(bench="update", case=case, variant=name, samples=samples, facts=facts)


def _line(result: Result) -> str:
    metrics, (low, high) = result.metrics(), result.spread()["wall_s"]
    memory = f"{metrics['peak_bytes'] / 2**20:8.0f} MiB" if "peak_bytes" in metrics else "       ? MiB"
    line = f"{result.variant:10s} {metrics['wall_s']:7.3f} s [{low:.3f}, {high:.3f}] {metrics['cpu_s']:7.3f} CPU s"
    ratio = f"  {metrics['speed_over_trl']:.2f} x trl's speed" if "speed_over_trl" in metrics else ""
    share = f"  {metrics['mfu_share']:.1%} MFU" if "mfu_share" in metrics else ""
    return f"{line} {memory}{ratio}{share}"


def run(args, folder: Path) -> list[Result]:
    more = [*args.changes, *([] if args.length is None else [f"sampling.max_new_tokens={args.length}"])]
    if args.tokens_per_microbatch is not None:
        more.append(f"update.tokens_per_microbatch={args.tokens_per_microbatch}")
    discrete, latent = (setting.config(mode, args.model, *more) for mode in ("discrete", "latent"))
    if args.batch % latent.group_size:
        raise UserError(f"--batch: wanted a multiple of {latent.group_size}, got {args.batch}")
    tokenizer = build.tokenizer(latent)
    groups = draw(latent, tokenizer, args.batch, args.length is not None)
    plain = without_latents(groups)
    policy = build.policy(latent)
    facts = setting.facts(latent) | _sizes(groups) | {
        "length": args.length, "changes": args.changes, "tokens_per_microbatch": latent.update.tokens_per_microbatch,
        "model_flops": model_flops(policy, groups, latent)}
    updates: dict[str, Update] = {
        "latent": our_update(latent, groups, policy), "discrete": our_update(discrete, plain, build.policy(discrete))}
    if args.against == "trl":
        from benches.trl_update import TrlUpdate  # heavy

        updates["trl"] = trl = TrlUpdate(discrete, tokenizer, args.batch, folder)
        trl.read(plain)
        facts["trl"] = metadata.version("trl")
    norms = {name: update() for name, update in updates.items()}
    if "trl" in norms:
        check_same(norms["discrete"], norms["trl"], setting.dtype(discrete))
    laps = interleave({n: _counting(update, facts["acted_tokens"]) for n, update in updates.items()}, args.rounds)
    peaks = {name: peak_bytes(update) for name, update in updates.items()}
    return [_result(name, laps, peaks, facts, mfu.peak_flop_s(policy.device, policy.dtype)) for name in updates]


def model_flops(policy: Policy, groups: Sequence[Group], config: Config) -> float | None:
    """Operations that one update on `groups` needs, packed as it packs them; None where fastlatent/mfu.py cannot tell."""
    cost, update = mfu.Cost.of(policy.base), config.update
    if cost is None:
        return None
    items = [Item(rollout, 1.0, 1.0) for group in groups for rollout in group.rollouts]
    chunks = microbatches(items, update.tokens_per_microbatch, update.share_prompts)
    return sum(float(cost.flops(pack(chunk, policy.device, update.share_prompts))) for chunk in chunks)


def _sizes(groups: Sequence[Group]) -> dict[str, int]:
    rollouts = [r for group in groups for r in group.rollouts]
    return {
        "completions": len(rollouts), "group_size": len(groups[0].rollouts),
        "prompt_tokens": sum(len(group.rollouts[0].request.prompt.token_ids) for group in groups),
        "completion_tokens": sum(len(r.token_ids) for r in rollouts),
        "acted_tokens": sum(sum(r.acted) for r in rollouts), "latent_tokens": sum(sum(r.latent) for r in rollouts)}


def main(argv: list[str]) -> None:
    parser = setting.parser("update", __doc__, rounds=7)
    parser.add_argument("--batch", type=int, default=64, metavar="B", help="completions, in groups of 8 (default: 64)")
    parser.add_argument("--against", choices=("trl", "none"), default="trl", help="the rival (default: trl)")
    parser.add_argument("--length", type=int, metavar="N", help="tokens of every completion (default: as the recipe ends them)")
    parser.add_argument("--tokens-per-microbatch", type=int, metavar="N", help="default: the recipe's")
    parser.add_argument("--with", dest="changes", action="append", default=[], metavar="KEY=VALUE",
                        help="an option of the recipe that is otherwise, such as model.compile=true; may be repeated")
    args = parser.parse_args(argv)
    setting.apply(args)
    machine = results.machine()
    with TemporaryDirectory() as folder:
        found = run(args, Path(folder))
    print("\n".join(map(_line, found)))
    print(f"{len(found)} lines in {results.append(found, machine, args.out)}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
