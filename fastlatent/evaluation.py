"""Held-out accuracy: greedy and sampled completions of the same engine that draws the rollouts, scored by the same rewards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from fastlatent.errors import UserError
from fastlatent.methods.base import Decision, Method, StepView
from fastlatent.rewards.base import RewardJob, RewardReport, RewardResult
from fastlatent.rewards.pool import RewardPool
from fastlatent.rollout.base import RolloutEngine
from fastlatent.rollout.failure import generate
from fastlatent.types import Prompt, Request, Rollout, Sampling

EVAL_STEP = 2**16 - 1
"""The step number of evaluation's noise; training steps stay below it."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One scored completion."""

    rollout: Rollout
    text: str
    result: RewardResult

    @property
    def is_correct(self) -> bool:
        """The first reward function of the run decides."""
        return next(iter(self.result.values.values())) == 1.0


def score(rollouts: Sequence[Rollout], tokenizer, pool: RewardPool, thinking_end: str) -> tuple[list[Sample], RewardReport]:
    """Decode and score completions; the reward pool's report comes second."""
    texts = tokenizer.batch_decode(
        [r.token_ids for r in rollouts], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    jobs = [
        RewardJob(
            prompt=r.request.prompt.text, completion=text, answer=r.request.prompt.answer,
            columns=r.request.prompt.columns | {
                "forced_end": r.forced_end, "finish": r.finish, "num_tokens": len(r.token_ids),
                "num_thinking": r.num_thinking, "thinking_end": thinking_end})
        for r, text in zip(rollouts, texts, strict=True)]
    results, report = pool.score(jobs)
    return [Sample(*row) for row in zip(rollouts, texts, results, strict=True)], report


def evaluate(engine: RolloutEngine, prompts: Sequence[Prompt], sampling: Sampling, num_samples: int, tokenizer,
             pool: RewardPool, thinking_end: str) -> list[Sample]:
    """`num_samples` completions of every prompt, siblings side by side."""
    requests = [Request(prompt, EVAL_STEP, sample) for prompt in prompts for sample in range(num_samples)]
    return score(generate(engine, requests, sampling), tokenizer, pool, thinking_end)[0]


def accuracy(samples: Sequence[Sample]) -> float:
    return fmean(sample.is_correct for sample in samples)


def missing_lines(samples: Sequence[Sample], report: RewardReport) -> list[str]:
    """One line where samples count as wrong only because the deciding reward is missing, with a reason from the report."""
    name = next(iter(samples[0].result.values))
    num_missing = sum(sample.result.values[name] is None for sample in samples)
    why = next((f" ({error})" for error in report.errors if error.startswith(f"{name}: ")), "")
    return [f"warning: {num_missing} of {len(samples)} have no reward {name} and count as wrong{why}"] if num_missing else []


class _Ablated(Method):
    """A method with its latents taken away (`off`), or each row fed its neighbour's (`shuffled`)."""

    def __init__(self, inner: Method, how: str):
        torch.nn.Module.__init__(self)
        self.inner, self.how, self.needs, self.model = inner, how, inner.needs, inner.model

    def record_spec(self, width, sampling):
        return self.inner.record_spec(width, sampling)

    def start(self, num_slots, device):
        return self.inner.start(num_slots, device)

    def draw(self, view: StepView, state) -> None:
        self.inner.draw(view, state)

    def embed(self, token_ids_T: Tensor, latent_T: Tensor, record_T) -> Tensor:
        return self.inner.embed(token_ids_T, latent_T, record_T)

    def decide(self, view: StepView, state) -> Decision:
        decision = self.inner.decide(view, state)
        if self.how == "off":
            decision.latent_B = torch.zeros_like(decision.latent_B)
        else:
            decision.record = {name: column.roll(1, 0) for name, column in decision.record.items()}
        return decision


@contextmanager
def ablated(engine: RolloutEngine, how: str) -> Iterator[None]:
    """Inside the block the engine draws with latents `off` or `shuffled` among rows."""
    if how not in ("off", "shuffled"):
        raise UserError(f"ablation: {how!r} is not one of off, shuffled")
    method = engine.method
    engine.method = _Ablated(method, how)
    try:
        yield
    finally:
        engine.method = method
