"""The names a run may log: every metric with its meaning, every timed span; a name outside the tables is an error.

Names are TRL's where it has one. `time/*` and `perf/*` are measurements; every other value is a function of the
configuration and the seed, and comes out bit for bit the same again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

SPANS: dict[str, str] = {
    "step": "one training step, from its weights handed to the engine to the last optimizer step",
    "rollout": "drawing completions and scoring them, every round of a step that draws again for lack of variance",
    "rollout/weight_sync": "handing the weights to the engine, if it has older ones",
    "rollout/prefill": "reading the prompts; where requests come and go while others decode, those of the first batch",
    "rollout/decode": "drawing tokens one by one",
    "rollout/sample": "vocabulary head, draw and the method's decision, within decoding (vllm: a first token's within prefill)",
    "rollout/reward": "decoding the text and scoring it",
    "score_old": "log-probabilities under the weights that sampled",
    "score_ref": "log-probabilities under the frozen reference",
    "update": "learning from the step's groups",
    "update/microbatch": "one packed microbatch, forward and backward",
    "update/forward": "forward pass through the blocks",
    "update/head": "vocabulary head and log-probabilities",
    "update/backward": "backward pass",
    "update/optimizer": "gradient clip and optimizer step",
    "checkpoint": "saving",
    "evaluate": "held-out evaluation",
}
"""What may be timed with `profiling.span`, in the order of a step:

    step > rollout {weight_sync, prefill, decode {sample}, reward}, score_old, score_ref,
           update {microbatch {forward, head, backward}, optimizer}
    evaluate, checkpoint

New weights are handed over when the engine next draws, which opens a rollout, or an evaluation: after the update would be
outside of both. Sampling lies within decoding, because on a GPU one CUDA graph holds both. Held-out evaluation and saving come
after the step: not every step has them, and its line in the log, with its time, is written before they begin. Scoring and
evaluation pass through the code of update and rollout: a profiler shows those ranges within theirs, and the times of `update/*`
and `rollout/*` leave them out, so that parts are never longer than their whole.
"""

PHASES: dict[str, tuple[str, ...]] = {
    "rollout": ("rollout",), "reward": ("rollout/reward",), "sync": ("rollout/weight_sync",),
    "score": ("score_old", "score_ref"), "update": ("update",)}
"""What a step's time goes into, and the spans that tell. The step's rest is packing, bookkeeping, and an engine's giving its
memory back for the update."""

NAMES: dict[str, str] = {
    "step": "training steps finished when the line was written",
    "num_tokens": "completion tokens drawn in the step, filtered groups included",
    "reward": "mean reward of the completions learnt from",
    "reward_std": "standard deviation of those rewards over the whole step",
    "group_reward_std": "mean over groups of the standard deviation of their rewards",
    "frac_reward_zero_std": "share of drawn groups whose rewards are all equal",
    "num_groups_filtered": "groups drawn and left out: those without variance, and those beyond the number a step wants",
    "rewards/{func}/mean": "mean of one reward function, before its weight",
    "rewards/{func}/std": "standard deviation of one reward function",
    "advantages/max": "largest magnitude of an advantage",
    "completions/mean_length": "mean completion length in tokens",
    "completions/min_length": "shortest completion in tokens",
    "completions/max_length": "longest completion in tokens",
    "completions/clipped_ratio": "share of completions cut by their length limit",
    "completions/mean_terminated_length": "mean length in tokens of the completions that ended by themselves",
    "thinking/mean_length": "mean number of tokens drawn while thinking",
    "thinking/forced_ratio": "share of completions whose thinking was ended by force",
    "entropy": "mean entropy in nats of the sampling distribution, over drawn tokens",
    "policy_loss": "value of the policy-gradient surrogate",
    "kl": "mean KL estimate to the frozen reference, in nats per token",
    "policy/approx_kl": "mean KL estimate (k3) from the weights that sampled to the current ones, in nats per token",
    "policy/ratio_mean": "mean importance ratio",
    "clip_ratio/low_mean": "share of tokens clipped at the lower bound of the ratio",
    "clip_ratio/high_mean": "share of tokens clipped at the upper bound of the ratio",
    "clip_ratio/region_mean": "share of tokens clipped at either bound",
    "clip_ratio/dual_mean": "share of tokens whose loss the dual clip bounds",
    "sampling/sampling_logp_difference/mean": "mean |log-probability when drawn - when recomputed|",
    "sampling/sampling_logp_difference/max": "largest |log-probability when drawn - when recomputed|",
    "sampling/{kind}/num_tokens": "places compared: `latent` where a latent was read or drawn, `token` elsewhere",
    "sampling/{kind}/logp_difference/mean": "mean |log-probability when drawn - when recomputed| of those tokens",
    "sampling/{kind}/logp_difference/max": "largest |log-probability when drawn - when recomputed| of those tokens",
    "sampling/{kind}/kl": "KL estimate (k3) from the engine's distribution to the trainer's, in nats per token",
    "sampling/{kind}/ratio_{stage}/p{percent}": "percentile of the importance ratio trainer / engine, `raw` or `corrected`",
    "sampling/{kind}/ratio_{stage}/effective_sample_size": "equal weights that these are worth: (sum w)^2 / sum w^2",
    "sampling/{kind}/frac_corrected": "share of tokens whose ratio the correction changed",
    "sft/loss": "mean cross-entropy of demonstrated tokens and weighted mean KL of demonstrated mixtures, in nats",
    "sft/token_loss": "mean cross-entropy of demonstrated tokens, in nats",
    "sft/latent_kl": "mean KL from demonstrated mixtures to the policy, in nats",
    "grad_norm": "norm of the gradient before clipping",
    "learning_rate": "learning rate of the model's weights in the next optimizer step",
    "latent/frac_tokens": "share of completion tokens read as latent inputs",
    "latent/steps_per_completion/mean": "mean number of latent inputs per completion",
    "latent/gate_mean": "mean of the token's share `a` in a latent input (HRPO); 1 is token-only reasoning",
    "latent/gate_std": "spread of `a` over dimensions, mean over positions",
    "latent/gate_min": "least `a` over dimensions, mean over positions",
    "latent/norm_ratio": "norm of the latent part over the norm of the token's embedding",
    "latent/exit_{reason}": "share of completions by how thinking ended: its own `end`, `forced`, or `cut` by the completion's",
    "latent/mixture_entropy": "mean entropy in nats of a mixture's weights",
    "latent/effective_k": "mean number of equally weighted tokens that a mixture is worth: 1 / sum of its squared weights",
    "latent/noise_used": "mean recorded noise of a mixture's tokens: 0 at the lower end of its interval, 1 at the upper",
    "latent/frac_passed": "share of a mixture's tokens whose log-probability now lies above their noisy score (d < 0)",
    "latent/ratio_mean_{mode}": "mean importance ratio of the actions that are a `latent` or a `token`",
    "latent/clip_ratio_{mode}": "share of those actions whose ratio is clipped",
    "latent/frac_first_selected": "share of groups of which one completion alone is learnt from at the first position",
    "latent/frac_masked": "share of completions that are not learnt from because they were cut",
    "method/{statistic}": "a statistic of a method's own; its `statistics` says which",
    "guard/skipped_steps": "optimizer steps skipped so far for a non-finite loss or gradient",
    "guard/reward_{failure}": "rewards of the step that could not be had, by cause",
    "eval/accuracy": "held-out accuracy of the greedy completion",
    "eval/sampled_accuracy": "held-out accuracy of sampled completions",
    "eval/accuracy_latents_{how}":
        "held-out greedy accuracy with latents on, off, or shuffled among rows, before and after training",
    "eval/mean_length": "mean length in tokens of held-out greedy completions",
    "eval/thinking_length": "mean number of thinking tokens in held-out greedy completions",
    "perf/tokens_per_s": "completion tokens per second of the whole step",
    "perf/rollout_tokens_per_s": "completion tokens per second of the rollout without rewards and hand-over of weights",
    "perf/peak_memory_gb": "most GPU memory allocated so far, in GiB",
    "perf/update_tokens_per_s": "packed tokens that the update learnt from per second of it",
    "perf/update_tflop_per_s": "operations that its forward and backward passes need, in 10^12 per second of the update",
    "perf/mfu": "those over the dense bfloat16 peak of the GPU; left out where that is not known",
    "perf/oom_splits": "microbatches of the step that were split in two because memory ran out",
} | {f"time/{name}": f"seconds of {meaning}" for name, meaning in SPANS.items()}
"""Every metric name and what it says; `{...}` stands for one part without a slash."""


def phase_seconds(row: Mapping[str, float | None]) -> dict[str, float]:
    """Seconds of each of PHASES in a line of the log; disjoint: a span's without those of the others that lie in it."""
    out, spans = {}, [span for spans in PHASES.values() for span in spans]
    for phase, outer in PHASES.items():
        parts = [(span, row[f"time/{span}"]) for span in outer if row.get(f"time/{span}") is not None]
        inner = (row.get(f"time/{other}") or 0.0 for span, _ in parts for other in spans if other.startswith(f"{span}/"))
        if parts:
            out[phase] = sum(seconds for _, seconds in parts) - sum(inner)
    return out


@lru_cache(maxsize=1024)
def check(name: str) -> str:
    """The entry of NAMES that `name` is or follows; KeyError where there is none."""
    if name in NAMES:
        return name
    for pattern in NAMES:
        if "{" in pattern and re.fullmatch(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(pattern)), name):
            return pattern
    raise KeyError(f"{name!r} is not a metric; the table is fastlatent.metrics.NAMES")


def is_reproducible(name: str) -> bool:
    """Whether a repeated run logs the same value bit for bit."""
    return not name.startswith(("time/", "perf/"))
