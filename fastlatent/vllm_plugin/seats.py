"""Between vLLM's requests and our slots: which slot a request has, and the weights its tokens are drawn with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlatent.profiling import span
from fastlatent.rollout.slots import Slots

KEY = "fastlatent"
"""Name of our key among a request's `SamplingParams.extra_args`; vLLM's own request ids carry a random suffix."""


@dataclass(slots=True)
class Seats:
    slots: Slots
    head: Callable[[], tuple[Tensor, Tensor]]  # the LM head's weight and the embedding table, as they are now

    def slot_of(self, new_request) -> int:
        """The slot of a request that vLLM schedules: the one it has kept through a preemption, or a fresh one.

        Slots are given back by the engine alone, when a request has finished or is aborted.
        """
        key = new_request.sampling_params.extra_args[KEY]
        if key not in self.slots.slot_of:
            self.slots.seat(key)
        return self.slots.slot_of[key]

    @torch.no_grad()
    def inputs(self, token_ids_T: Tensor, slot_T: Tensor, time_T: Tensor) -> Tensor:
        return self.slots.inputs(token_ids_T, slot_T, time_T)

    @torch.no_grad()
    def prompt_inputs(self, token_ids_T: Tensor) -> Tensor:
        return self.slots.prompt_inputs(token_ids_T)

    @torch.no_grad()
    def draw(self, hidden_BD: Tensor, slot_B: Tensor, time_B: Tensor) -> Tensor:
        """Names [B] of the tokens drawn from these hidden states."""
        with span("rollout/sample"):
            return self.slots.draw(hidden_BD, *self.head(), slot_B, time_B)
