"""What a step, an evaluation and the ablations say in the log: host numbers, read from the device once, after the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev

import torch
from torch import Tensor

from fastlatent import mismatch
from fastlatent.advantages import has_variance
from fastlatent.evaluation import Sample, accuracy
from fastlatent.metrics import phase_seconds
from fastlatent.profiling import timings
from fastlatent.types import Group, Rollout
from fastlatent.update import UpdateResult


@dataclass(slots=True)
class Drawn:
    """Everything drawn in a step, groups that were filtered out included."""

    num_tokens: int = 0
    num_groups: int = 0
    num_without_variance: int = 0
    counters: dict[str, int] = field(default_factory=dict)  # of the reward pool: timeouts, crashes, exceptions, ...
    errors: list[str] = field(default_factory=list)  # its first few messages

    def add(self, groups: Sequence[Group], report) -> None:
        self.num_groups += len(groups)
        self.num_without_variance += sum(not has_variance(g) for g in groups)
        self.num_tokens += sum(len(r.token_ids) for g in groups for r in g.rollouts)
        self.errors += report.errors
        for name, count in report.counters().items():
            self.counters[name] = self.counters.get(name, 0) + count


def of_step(step: int, groups: Sequence[Group], samples: Sequence[Sample], drawn: Drawn, result: UpdateResult, lr: float, *,
            has_latents: bool) -> dict[str, float]:
    """`has_latents`: the method has them, and none in a step's completions is a share of 0."""
    out: dict[str, float] = {"step": step, "learning_rate": lr}
    out |= _rewards(groups, drawn)
    if samples:
        out |= _completions(samples, has_latents)
    out |= _update(result)
    out["num_tokens"] = drawn.num_tokens
    seconds = timings()
    out |= {f"time/{name}": value for name, value in seconds.items()}
    if drawing_s := phase_seconds(out).get("rollout"):
        out["perf/rollout_tokens_per_s"] = drawn.num_tokens / drawing_s
    if seconds.get("step"):
        out["perf/tokens_per_s"] = drawn.num_tokens / seconds["step"]
    out |= _update_speed(result, seconds.get("update"))
    if torch.cuda.is_available():
        out["perf/peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
    return out


def _rewards(groups: Sequence[Group], drawn: Drawn) -> dict[str, float]:
    rewards = [r for g in groups for r in g.reward_G.tolist() if not math.isnan(r)]
    out = {f"guard/reward_{name}": float(count) for name, count in drawn.counters.items()}
    out["frac_reward_zero_std"] = drawn.num_without_variance / max(drawn.num_groups, 1)
    out["num_groups_filtered"] = float(drawn.num_groups - len(groups))
    if not rewards:
        return out
    out["reward"] = fmean(rewards)
    out["reward_std"] = pstdev(rewards)
    by_group = [[r for r in g.reward_G.tolist() if not math.isnan(r)] for g in groups]
    out["group_reward_std"] = fmean(pstdev(group) for group in by_group if group)
    out["advantages/max"] = max(float(g.advantage_G.abs().max()) for g in groups)
    for name in groups[0].rewards:
        values = [v for g in groups for v in g.rewards[name] if v is not None]
        if values:
            out |= {f"rewards/{name}/mean": fmean(values), f"rewards/{name}/std": pstdev(values)}
    return out


def _completions(samples: Sequence[Sample], has_latents: bool) -> dict[str, float]:
    rollouts = [s.rollout for s in samples]
    lengths = [len(r.token_ids) for r in rollouts]
    ended = [n for n, r in zip(lengths, rollouts, strict=True) if r.finish == "stop"]
    entropies = [e for r in rollouts for e, is_action in zip(r.entropy, r.acted, strict=True) if is_action]
    out = {
        "completions/mean_length": fmean(lengths), "completions/min_length": min(lengths),
        "completions/max_length": max(lengths), "completions/clipped_ratio": 1 - len(ended) / len(lengths),
        "thinking/mean_length": fmean(r.num_thinking for r in rollouts),
        "thinking/forced_ratio": fmean(r.forced_end for r in rollouts),
        "entropy": fmean(entropies),
    }
    if ended:
        out["completions/mean_terminated_length"] = fmean(ended)
    if has_latents:
        steps = [sum(r.latent) for r in rollouts]
        out |= {"latent/steps_per_completion/mean": fmean(steps), "latent/frac_tokens": sum(steps) / sum(lengths)}
        reasons = [_exit(r) for r in rollouts]
        out |= {f"latent/exit_{reason}": reasons.count(reason) / len(reasons) for reason in ("end", "forced", "cut")}
    return out


def _exit(rollout: Rollout) -> str:
    """How thinking came to its end; a completion that ends while thinking is cut."""
    return "forced" if rollout.forced_end else "cut" if all(rollout.thinking) else "end"


def _update(result: UpdateResult) -> dict[str, float]:
    if result.loss is None:  # every group was without variance: nothing to learn from
        return {"grad_norm": 0.0, "policy_loss": 0.0}
    sums = {name: float(value) for name, value in result.sums.items()}
    count = max(sums.pop("count"), 1.0)
    out = {"grad_norm": float(result.grad_norm), "policy_loss": sums["policy_loss"] / len(result.attempts),
           "kl": sums["kl"] / count, "clip_ratio/low_mean": sums["clip_low"] / count,
           "clip_ratio/high_mean": sums["clip_high"] / count,
           "clip_ratio/region_mean": (sums["clip_low"] + sums["clip_high"]) / count,
           "clip_ratio/dual_mean": sums["dual_clipped"] / count, "policy/approx_kl": sums["approx_kl"] / count,
           "policy/ratio_mean": sums["ratio"] / count}
    return out | mismatch.summary(result.gaps) | of_statistics(result.statistics)


def _update_speed(result: UpdateResult, update_s: float | None) -> dict[str, float]:
    out = {"perf/oom_splits": float(result.num_splits)}
    if result.loss is None or not update_s:
        return out
    out["perf/update_tokens_per_s"] = result.num_tokens / update_s
    if result.flops is not None:
        flop_s = float(result.flops) / update_s
        out["perf/update_tflop_per_s"] = flop_s / 1e12
        if result.peak_flop_s is not None:
            out["perf/mfu"] = flop_s / result.peak_flop_s
    return out


def of_statistics(statistics: dict[str, Tensor]) -> dict[str, float]:
    """Means of `Method.statistics` pairs; a statistic without a latent position is left out."""
    pairs = {name: pair.tolist() for name, pair in statistics.items()}
    return {name: total / count for name, (total, count) in pairs.items() if count}


def sample_rows(step: int, samples: Sequence[Sample], count: int) -> list[dict]:
    """The first `count` completions of a step, as they go into samples.jsonl."""
    return [sample_row(step, sample) for sample in samples[:count]]


def sample_row(step: int, sample: Sample) -> dict:
    r = sample.rollout
    return {
        "step": step, "prompt_id": r.request.prompt.id, "sample": r.request.sample, "prompt": r.request.prompt.text,
        "completion": sample.text, "answer": r.request.prompt.answer, "reward": sample.result.total,
        "rewards": sample.result.values, "finish": r.finish, "forced_end": r.forced_end, "num_tokens": len(r.token_ids),
        "num_thinking": r.num_thinking, "num_latent": sum(r.latent), "token_ids": r.token_ids}


def of_demonstrations(step: int, demonstrations: Sequence[Rollout], result: UpdateResult, lr: float) -> dict[str, float]:
    """What a step of SFT says in the log."""
    lengths = [len(r.token_ids) for r in demonstrations]
    out = {"step": step, "learning_rate": lr, "grad_norm": float(result.grad_norm), "sft/loss": float(result.loss),
           "num_tokens": sum(lengths), "completions/mean_length": fmean(lengths),
           "thinking/mean_length": fmean(r.num_thinking for r in demonstrations), "perf/oom_splits": float(result.num_splits)}
    seconds = timings()
    return out | of_statistics(result.statistics) | {f"time/{name}": value for name, value in seconds.items()} | {
        "perf/tokens_per_s": out["num_tokens"] / seconds["step"]}


def of_evaluation(step: int, greedy: Sequence[Sample], sampled: Sequence[Sample]) -> dict[str, float]:
    out = {"step": step, "eval/accuracy": accuracy(greedy),
           "eval/mean_length": fmean(len(s.rollout.token_ids) for s in greedy),
           "eval/thinking_length": fmean(s.rollout.num_thinking for s in greedy)}
    if sampled:
        out["eval/sampled_accuracy"] = accuracy(sampled)
    return out


def evaluation_line(metrics: dict[str, float]) -> str:
    line = f"step {metrics['step']}: held-out greedy accuracy {metrics['eval/accuracy']:.3f}"
    if "eval/sampled_accuracy" in metrics:
        line += f", sampled {metrics['eval/sampled_accuracy']:.3f}"
    return f"{line}, {metrics['eval/mean_length']:.1f} tokens ({metrics['eval/thinking_length']:.1f} thinking)"


def of_ablations(step: int, samples: dict[str, Sequence[Sample]]) -> dict[str, float]:
    return {"step": step} | {f"eval/accuracy_latents_{how}": accuracy(rows) for how, rows in samples.items()}


def ablation_lines(samples: dict[str, Sequence[Sample]], metrics: dict[str, float]) -> list[str]:
    """Held-out greedy accuracy by what was done to the latents, each with its standard error; then the gate, if there is
    one."""
    lines = []
    for how, rows in samples.items():
        p = accuracy(rows)
        error = math.sqrt(p * (1 - p) / len(rows))
        thinking = fmean(s.rollout.num_thinking for s in rows)
        lines.append(f"latents {how:8s} accuracy {p:.3f} (standard error {error:.3f}), mean thinking length {thinking:.1f}")
    if "latent/gate_mean" in metrics:
        lines.append(f"gate a: mean {metrics['latent/gate_mean']:.4f}, spread over dimensions "
                     f"{metrics['latent/gate_std']:.4f}, least {metrics['latent/gate_min']:.4f}")
    return lines
