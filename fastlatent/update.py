"""One policy update: groups become weighted, packed microbatches; their gradients become one optimizer step (or several).

Nothing here waits for the device: sums stay tensors until the step is over, and a non-finite step is skipped by the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from fastlatent import mfu, mismatch, objectives
from fastlatent.methods.base import Method
from fastlatent.microbatch import Microbatch, OutOfMemory, read_each
from fastlatent.mismatch import Gap
from fastlatent.optim import Optimizer
from fastlatent.packing import Item, microbatches
from fastlatent.policy import Policy
from fastlatent.profiling import apart, span
from fastlatent.schema import Config, UpdateConfig
from fastlatent.types import Batch, Group


@dataclass(slots=True)
class Attempt:
    """One optimizer step: what it learnt from, and whether it was skipped as non-finite (a bool on the device)."""

    batches: list[Batch]
    is_bad: Tensor


@dataclass(slots=True)
class UpdateResult:
    """What an update left behind, still on the device."""

    sums: dict[str, Tensor] = field(default_factory=dict)  # of objectives.surrogate, over all microbatches
    statistics: dict[str, Tensor] = field(default_factory=dict)  # pairs (sum, count) of the first pass, by metric name
    gaps: list[Gap] = field(default_factory=list)  # between engine and trainer, before any weight moved
    loss: Tensor | None = None  # sum over the optimizer steps
    grad_norm: Tensor | None = None  # largest of the optimizer steps
    num_tokens: int = 0  # packed tokens read, all passes together
    attempts: list[Attempt] = field(default_factory=list)  # each optimizer step
    num_splits: int = 0  # microbatches split in two because memory ran out
    flops: Tensor | None = None  # operations that its forward and backward passes need (fastlatent/mfu.py); None: not known
    peak_flop_s: float | None = None  # of the device; None: not known

    def add_sums(self, sums: dict[str, Tensor]) -> None:
        _add(self.sums, sums)

    def add_statistics(self, statistics: dict[str, Tensor]) -> None:
        _add(self.statistics, statistics)

    def merge(self, more: UpdateResult) -> None:
        """Add what one optimizer step's passes left behind."""
        self.add_sums(more.sums)
        self.add_statistics(more.statistics)
        self.gaps += more.gaps
        self.num_tokens += more.num_tokens
        if more.flops is not None:
            self.flops = more.flops if self.flops is None else self.flops + more.flops


def _add(into: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    for name, value in more.items():
        into[name] = into[name] + value if name in into else value.detach()


class Updater:
    def __init__(self, policy: Policy, optimizer: Optimizer, config: Config):
        self.policy, self.optimizer, self.config = policy, optimizer, config
        self.method: Method = policy.method
        # at the sampling temperature unless told otherwise: the replay law's own
        self.temperature = config.objective.score_temperature or config.sampling.temperature
        self.cost = mfu.Cost.of(policy.base)
        self.peak_flop_s = mfu.peak_flop_s(policy.device, policy.dtype)

    def __call__(self, groups: Sequence[Group], commit: Callable[[], None] = lambda: None) -> UpdateResult:
        """Learn from `groups`; `commit` is called before every optimizer step, as after the first there is no way back."""
        objective = self.config.objective
        result = UpdateResult(peak_flop_s=self.peak_flop_s)
        for group in groups:
            result.add_statistics(self.method.group_statistics(group))
        minibatches = self._minibatches(groups)
        if objective.num_epochs * len(minibatches) > 1:
            # in a single pass they would equal the new log-probabilities bit for bit, but for dropout
            self._score_old(minibatches, result)
        self._measure(minibatches, result)
        if objective.kl_coef > 0:
            self._score_reference(minibatches, result)
        with span("update") as learning:
            for epoch in range(objective.num_epochs):
                for parts in minibatches:
                    self._step(parts, result, commit, is_first=epoch == 0)
            learning.tokens = result.num_tokens
        commit()
        self.optimizer.pass_over(objective.num_epochs * objective.num_minibatches - len(result.attempts))
        return result

    def _minibatches(self, groups: Sequence[Group]) -> list[list[Microbatch]]:
        """The packed microbatches of each optimizer step. Groups are dealt whole; weights are normalised per optimizer step."""
        objective, out = self.config.objective, []
        for part in range(objective.num_minibatches):
            rollouts, advantage = [], []
            for group in groups[part :: objective.num_minibatches]:
                rollouts += group.rollouts
                advantage += self.method.action_advantages(group)
            weight = objectives.token_weights(rollouts, objective, self.config.sampling.max_new_tokens)
            needs_all = objective.kl_coef > 0 or objective.entropy_coef > 0
            # without KL and entropy terms an advantage of 0 contributes no gradient, so its tokens need no pass
            items = [Item(r, a, w) for r, a, w in zip(rollouts, advantage, weight, strict=True)]
            items = [item for item in items if item.weight and (item.teaches or needs_all)]
            if items:
                update = self.config.update
                chunks = microbatches(items, update.tokens_per_microbatch, update.share_prompts)
                out.append([Microbatch.of(chunk, self.policy.device, update.share_prompts) for chunk in chunks])
        return out

    @torch.no_grad()
    def _score_old(self, minibatches: list[list[Microbatch]], result: UpdateResult) -> None:
        def score(batch: Batch) -> None:
            batch.old_logprob_A = self.method.score(self.policy, batch, self.temperature).logprob_A

        with span("score_old") as scoring, apart(), self.policy.without_dropout():
            self._read(minibatches, score, result, "score_old")
            scoring.tokens = sum(part.batch.num_tokens for parts in minibatches for part in parts)

    @torch.no_grad()
    def _measure(self, minibatches: list[list[Microbatch]], result: UpdateResult) -> None:
        """Find the mismatch of every token and correct for it. Without a correction nothing is scored for it alone: then it is
        found in the old log-probabilities, or in the first optimizer step's own."""
        config = self.config
        is_same = self.temperature == config.sampling.temperature
        corrects = config.mismatch.correction != "none"
        # at another temperature the update's log-probabilities say nothing, and only our own engine needs no watching
        needs_pass = corrects or not (is_same or config.engine.name == "hf")

        def measure(batch: Batch) -> None:
            logprob_A = batch.old_logprob_A if is_same else None
            if logprob_A is None and needs_pass:
                with span("score_old", batch.num_tokens), apart(), self.policy.without_dropout():
                    logprob_A = self.method.score(self.policy, batch, config.sampling.temperature).logprob_A
            if logprob_A is not None:
                gap = mismatch.measure(batch, logprob_A, config.mismatch)
                mismatch.apply(gap, batch)
                result.gaps.append(gap)

        self._read(minibatches, measure, result, "score_old")

    def _score_reference(self, minibatches: list[list[Microbatch]], result: UpdateResult) -> None:
        def score(batch: Batch) -> None:
            batch.ref_logprob_A = self.method.reference_logprob(self.policy, batch, self.temperature)

        with span("score_ref"), apart():
            self._read(minibatches, score, result, "score_ref")

    def _read(self, minibatches: list[list[Microbatch]], read: Callable[[Batch], None], result: UpdateResult,
              phase: str) -> None:
        for parts in minibatches:
            result.num_splits += read_each(parts, read, self.config.update, phase)

    def _step(self, parts: list[Microbatch], result: UpdateResult, commit: Callable[[], None], is_first: bool) -> None:
        # no weight has moved yet: what is between these log-probabilities and the rollout's is the mismatch
        is_unmeasured = not (result.gaps or result.attempts) and self.temperature == self.config.sampling.temperature
        learn = partial(self._learn, is_first=is_first, is_unmeasured=is_unmeasured)
        optimizer_step(parts, learn, self.optimizer, self.config.update, result, commit)

    def _learn(self, batch: Batch, found: UpdateResult, is_first: bool, is_unmeasured: bool) -> None:
        loss = self.method.loss(self.policy, batch, self.temperature, self.config.objective)
        with span("update/backward"):
            loss.value.backward()
        found.loss += loss.value.detach()
        found.num_tokens += batch.num_tokens
        found.add_sums(loss.sums)
        found.add_statistics(loss.statistics)
        if is_unmeasured:
            found.gaps.append(mismatch.measure(batch, loss.logprob_A, self.config.mismatch))
        if is_first:
            found.add_statistics(self.method.statistics(batch.token_ids_T, batch.latent_T, batch.record_T))
        if self.cost is not None:
            found.flops = self.cost.flops(batch) + (0 if found.flops is None else found.flops)


# ---- one optimizer step ---------------------------------------------------------------------------------------------


def optimizer_step(parts: Sequence[Microbatch], learn: Callable[[Batch, UpdateResult], None], optimizer: Optimizer,
                   config: UpdateConfig, result: UpdateResult, commit: Callable[[], None]) -> None:
    """Learn from `parts` in one step, which becomes part of `result`; `commit` is called before a weight moves.

    `learn` adds the gradient of a microbatch to the parameters', its loss and whatever else it says to the UpdateResult it is
    given. A microbatch for which memory runs out is split in two; OutOfMemory where it was, or cannot be.
    """
    parts = list(parts)
    while (failed := _accumulate(parts, learn, found := UpdateResult())) is not None:
        # some parameters have a part of its gradient and some have not: the step starts over, from gradients of zero
        optimizer.zero_grad()
        try:
            parts[failed : failed + 1] = parts[failed].halves(config)
        except OutOfMemory as error:
            error.is_whole = not result.attempts
            raise
        result.num_splits += 1
    result.merge(found)
    with span("update/optimizer"):
        norm = optimizer.clip()
        is_bad = ~(norm.isfinite() & found.loss.isfinite())
        commit()
        optimizer.step(is_bad)
    result.loss = found.loss if result.loss is None else result.loss + found.loss
    result.grad_norm = norm if result.grad_norm is None else torch.maximum(result.grad_norm, norm)
    result.attempts.append(Attempt([part.batch for part in parts], is_bad))


def _accumulate(parts: list[Microbatch], learn: Callable[[Batch, UpdateResult], None], found: UpdateResult) -> int | None:
    """Add each microbatch's gradient to the parameters'; the index of the one at which memory ran out, or None."""
    found.loss = torch.zeros((), device=parts[0].batch.score_A.device)
    for index, part in enumerate(parts):
        try:
            with span("update/microbatch", part.batch.num_tokens):
                learn(part.batch, found)
        except torch.OutOfMemoryError:
            return index  # with the error go its frames, which hold the activations
    return None
