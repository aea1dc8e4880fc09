"""Held-out questions of a run in training: answered greedily and sampled at the steps that are due, at the first and the last
also with the latents taken away; which step answered best is remembered.

Nothing here moves a weight or writes a file: the engine draws with the weights it has been handed, and the trainer logs what
comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastlatent import build, evaluation, step_metrics
from fastlatent.evaluation import Sample
from fastlatent.packing import Item, microbatches, pack
from fastlatent.policy import Policy
from fastlatent.rewards.pool import RewardPool
from fastlatent.rollout.base import RolloutEngine
from fastlatent.schema import Config
from fastlatent.types import Prompt
from fastlatent.update import UpdateResult


@dataclass(slots=True)
class Measured:
    """What was found, for the log and for whoever watches."""

    metrics: dict[str, float]
    lines: list[str]


class HeldOut:
    """The held-out questions and what came of them. `is_ablated`: in the end they are answered without the latents, too.
    `engine` is None where nothing is ever drawn, and so nothing due."""

    def __init__(self, config: Config, prompts: Sequence[Prompt], policy: Policy, engine: RolloutEngine | None, tokenizer,
                 pool: RewardPool):
        self.config, self.prompts, self.policy, self.engine = config, prompts, policy, engine
        self.tokenizer, self.pool = tokenizer, pool
        self.is_ablated = config.eval.ablations and build.has_latents(config, policy)
        self.is_start_ablated = self.is_ablated and config.sft is None  # what SFT starts from has no latents to take away
        self.last_greedy: list[Sample] = []
        self.evaluated_step, self.best_accuracy, self.best_step = -1, -1.0, None

    def is_due(self, step: int) -> bool:
        every = self.config.eval.every
        return every > 0 and (step % every == 0 or step == self.config.num_steps) and step != self.evaluated_step

    def measure(self, step: int) -> Measured:
        """Accuracy and lengths, greedy and sampled; where the run starts also the ablations."""
        greedy = self.last_greedy = self._draw(step)
        missing = evaluation.missing_lines(greedy, self.pool.report)
        sampled = self._draw(step, num_samples=n, greedy=False) if (n := self.config.eval.num_samples) else []
        ablations = self._ablations(step) if step == 0 and self.is_start_ablated else {}
        metrics = step_metrics.of_evaluation(step, greedy, sampled) | step_metrics.of_ablations(step, ablations)
        lines = [f"step 0: {line}" for line in step_metrics.ablation_lines(ablations, {})]
        return Measured(metrics, [step_metrics.evaluation_line(metrics), *missing, *lines])

    def remember(self, step: int, accuracy: float) -> bool:
        """Keep in mind that `step` was measured; whether it answered best so far. Untrained weights never do."""
        self.evaluated_step = step
        is_best = step > 0 and accuracy > self.best_accuracy
        if is_best:
            self.best_accuracy, self.best_step = accuracy, step
        return is_best

    def ablate(self, step: int) -> Measured:
        """What the latents are good for in the end, and the method's statistics of them."""
        samples = self._ablations(step)
        metrics = step_metrics.of_ablations(step, samples) | self._latent_statistics(samples["on"])
        return Measured(metrics, step_metrics.ablation_lines(samples, metrics))

    def state(self) -> dict[str, Any]:
        return {"best_accuracy": self.best_accuracy, "best_step": self.best_step, "evaluated_step": self.evaluated_step}

    def load(self, state: dict[str, Any]) -> None:
        self.best_accuracy, self.best_step = state["best_accuracy"], state["best_step"]
        self.evaluated_step = state["evaluated_step"]

    def _draw(self, step: int, *, num_samples: int = 1, greedy: bool = True) -> list[Sample]:
        if self.engine.version != step:
            raise RuntimeError(f"the engine has the weights of version {self.engine.version}, expected {step}")
        return evaluation.evaluate(self.engine, self.prompts, build.sampling_of(self.config, greedy=greedy), num_samples,
                                   self.tokenizer, self.pool, self.config.thinking.end)

    def _ablations(self, step: int) -> dict[str, list[Sample]]:
        """Greedy samples with latents as trained, off, and shuffled among rows."""
        out = {"on": self.last_greedy or self._draw(step)}
        for how in ("off", "shuffled"):
            with evaluation.ablated(self.engine, how):
                out[how] = self._draw(step)
        return out

    def _latent_statistics(self, samples: Sequence[Sample]) -> dict[str, float]:
        """The method's latent/* statistics over these completions, under the weights of now."""
        items = [Item(s.rollout, 0.0, 0.0) for s in samples]
        result = UpdateResult()
        for chunk in microbatches(items, self.config.update.tokens_per_microbatch, share_prompts=False):
            batch = pack(chunk, self.policy.device)
            result.add_statistics(self.policy.method.statistics(batch.token_ids_T, batch.latent_T, batch.record_T))
        return step_metrics.of_statistics(result.statistics)
