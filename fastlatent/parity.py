"""The parity probe: before training, a few tokens drawn by the engine are scored by the trainer; a run whose two halves
disagree from the start is refused.

Its noise has a step number of its own and its completions go nowhere, so a run is the same with it and without.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastlatent import build
from fastlatent.errors import UserError
from fastlatent.evaluation import EVAL_STEP
from fastlatent.packing import Item, microbatches, pack
from fastlatent.policy import Policy
from fastlatent.rollout.base import RolloutEngine
from fastlatent.rollout.failure import generate
from fastlatent.schema import Config
from fastlatent.types import Prompt, Request, Rollout

PROBE_STEP = EVAL_STEP - 1
"""The step number of the probe's noise; training steps stay below it."""

COMPLETIONS, LENGTH = 8, 16
"""Completions drawn at a time, and the most tokens of each: half of them may end at once and one round still gives 64."""

FLOAT32_MAX = 2e-3
"""Largest |difference| of a token in float32: ten times what replaying our own engine is held to (2e-4, two layers), as other
kernels and deeper models add in another order. One layer's weights five percent off move the mean of a tiny model to 2e-2."""

BFLOAT16_MEAN = 0.06
"""Mean |difference| in bfloat16, where single tokens may be far off: twice what replay is held to (0.03) and the root mean
square measured between two engines in production (0.03, ServiceNow/Fast-LLM#525). Our own engine is at about 0.03 on
SmolLM2-135M on a CPU."""


@dataclass(frozen=True, slots=True)
class Parity:
    """What the probe found, over `num_tokens` tokens of which `num_latent` were predicted from a latent input."""

    engine: str
    dtype: torch.dtype
    num_tokens: int
    num_latent: int
    mean: float
    max: float

    @property
    def is_close(self) -> bool:
        """False for what is not a number, too."""
        return self.max <= FLOAT32_MAX if self.dtype == torch.float32 else self.mean <= BFLOAT16_MEAN

    def line(self) -> str:
        return (f"parity of engine {self.engine!r} and trainer: |log-probability difference| mean {self.mean:.2g}, "
                f"max {self.max:.2g} over {self.num_tokens} tokens ({self.num_latent} read from latents)")

    def check(self) -> None:
        """UserError where the two are too far apart to train."""
        if self.is_close:
            return
        wanted = f"a max of at most {FLOAT32_MAX}" if self.dtype == torch.float32 else f"a mean of at most {BFLOAT16_MEAN}"
        raise UserError(
            f"{self.line()}; {str(self.dtype).removeprefix('torch.')} wants {wanted}: the engine does not compute what the "
            f"trainer computes; engine.name=hf always does, and mismatch.probe_tokens=0 trains all the same")


@torch.no_grad()
def probe(config: Config, policy: Policy, engine: RolloutEngine, prompts: Sequence[Prompt]) -> Parity:
    """Draw completions of `prompts` until they hold `mismatch.probe_tokens` acted tokens, and replay them."""
    items = [Item(r, 0.0, 0.0) for r in _draw(config, engine, prompts) if any(r.acted)]
    if not items:
        raise UserError(f"sampling.max_new_tokens: {config.sampling.max_new_tokens} tokens end before method "
                        f"{config.method.name!r} draws one that is an action; wanted more")
    deltas, latents = [], []
    with policy.without_dropout():
        for chunk in microbatches(items, config.update.tokens_per_microbatch, config.update.share_prompts):
            batch = pack(chunk, policy.device, config.update.share_prompts)
            logprob_A = policy.method.score(policy, batch, config.sampling.temperature).logprob_A
            deltas.append((logprob_A.float() - batch.behaviour_logprob_A).abs())
            latents.append(batch.latent_T[batch.score_A])
    delta_A: Tensor = torch.cat(deltas).double()
    return Parity(config.engine.name, policy.dtype, len(delta_A), int(torch.cat(latents).sum()), delta_A.mean().item(),
                  delta_A.max().item())


def _draw(config: Config, engine: RolloutEngine, prompts: Sequence[Prompt]) -> list[Rollout]:
    sampling, rollouts = build.sampling_of(config), []
    length = min(most := sampling.max_new_tokens, LENGTH)
    for round_ in range(math.ceil(config.mismatch.probe_tokens / COMPLETIONS)):  # enough even of single tokens
        places = range(round_ * COMPLETIONS, (round_ + 1) * COMPLETIONS)
        requests = [Request(prompts[i % len(prompts)], PROBE_STEP, i // len(prompts)) for i in places]
        fresh = generate(engine, requests, replace(sampling, max_new_tokens=length))
        while length < most and not any(any(r.acted) for r in fresh):  # a block of latents that are no actions is longer
            length = min(most, 2 * length)
            fresh = generate(engine, requests, replace(sampling, max_new_tokens=length))
        rollouts += fresh
        if sum(sum(r.acted) for r in rollouts) >= config.mismatch.probe_tokens:
            break
    return rollouts
