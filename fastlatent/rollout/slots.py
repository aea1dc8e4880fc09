"""What a continuously batching engine keeps of each request in flight: one slot a request, whoever it shares a step with.

The engine schedules; a slot remembers. Tokens, latents and records are written to the slot when they are drawn and read from
it whenever they are an input: at decode, in a chunk of a prompt, after preemption. The scheduler never sees a token, only a
name for it: 0 for the last one of a completion, otherwise a number that differs from those of other requests at the same place.
So a key-value cache keyed by names shares prompts and nothing that a latent has touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastlatent.methods.base import Method
from fastlatent.rollout.buffers import Buffers, Row, rollouts
from fastlatent.rollout.draw import look, settle
from fastlatent.rollout.thinking import ThinkingSpan
from fastlatent.types import Request, Rollout, Sampling

LAST = 0
"""The name of a completion's last token: the scheduler stops at it."""

STRIDE = 0x9E3779B1
"""From one name of a request to its next, so that they are not those of a text that repeats a token."""


class Slots:
    """`num_slots` requests at once of one call of `generate`; every tensor is on the device, nothing but `rollouts`
    waits for it."""

    def __init__(self, num_slots: int, seed: Tensor, vocab_size: int):
        self.seed = seed
        self.num_slots, self.device = num_slots, seed.device
        self.free = list(range(num_slots))
        self.slot_of: dict[int, int] = {}  # key of a request in flight -> its slot
        self.requests: dict[int, Request] = {}
        self.next_key = 0
        self.num_names = vocab_size - 1  # as many requests in a row share no name; then they come round again
        # one slot more than there are requests: rows of a step that draw nothing write to it
        self.nowhere = num_slots
        self.counter_S2 = torch.zeros((num_slots + 1, 2), dtype=torch.int64, device=self.device)
        self.key_S = torch.zeros(num_slots + 1, dtype=torch.int64, device=self.device)
        self.is_in_order = torch.ones((), dtype=torch.bool, device=self.device)
        self.buffers: Buffers | None = None
        self._layout = None

    # ---- a call of generate ---------------------------------------------------------------------------------------------

    def begin(self, requests: Sequence[Request], sampling: Sampling, method: Method, span: ThinkingSpan) -> list[int]:
        """Make ready for these requests; returns the key of each, which no other request ever has."""
        if self.slot_of:
            raise RuntimeError(f"{len(self.slot_of)} requests of an earlier call still hold slots")
        keys = list(range(self.next_key, self.next_key + len(requests)))
        self.requests, self.next_key = dict(zip(keys, requests)), self.next_key + len(requests)
        self.sampling, self.method, self.span = sampling, method, span
        self.span_state = span.start(self.num_slots + 1, self.device)
        self.state = self.method.start(self.num_slots + 1, self.device)
        layout = (self.span.longest(sampling.max_new_tokens), self.method.record_spec(self.method.model.width, sampling))
        if layout != self._layout:
            self._layout, self.buffers = layout, None  # freed before the next ones are made
            self.buffers = Buffers(self.num_slots + 1, *layout, self.device)
        return keys

    @property
    def size_bytes(self) -> int:
        """Of what is written down for the slots, on the device."""
        return 0 if self.buffers is None else self.buffers.size_bytes

    def seat(self, key: int) -> None:
        """Give request `key` a slot as of before its first token."""
        if not self.free:
            raise RuntimeError(f"more than {self.num_slots} requests are in flight, and there is no slot for another")
        slot = self.slot_of[key] = self.free.pop()
        request = self.requests[key]
        # numbers one by one: a tensor made of them on the host would have to be waited for
        self.counter_S2[slot, 0] = request.prompt.id
        self.counter_S2[slot, 1] = (request.step << 16) + request.sample
        self.key_S[slot] = key
        for state, fresh in ((self.span_state, self.span.start(1, self.device)),
                             (self.state, self.method.start(1, self.device))):
            for name, column in state.items():
                column[slot] = fresh[name][0]
        self.buffers.length[slot] = 0

    def leave(self, keys: Iterable[int]) -> None:
        """Take the slots of these requests back, if they have any."""
        for key in keys:
            slot = self.slot_of.pop(key, None)
            if slot is not None:
                self.free.append(slot)

    def take(self, key: int, num_tokens: int) -> Row:
        """A copy of what was written of request `key`, which has ended with so many tokens; its slot is free afterwards."""
        slot = self.slot_of[key]
        self.is_in_order &= self.buffers.length[slot] == num_tokens
        self.buffers.park(slot, {name: column[slot] for name, column in self.span_state.items()})
        row = self.buffers.row(slot, num_tokens).copy()
        self.leave([key])
        return row

    def rollouts(self, keys: Sequence[int], rows: list[Row], version: int) -> list[Rollout]:
        """Of these requests and what was taken of them; `rows` is emptied. The only place that waits for the device."""
        if not self.is_in_order:
            raise RuntimeError("a completion's tokens were not drawn one after the other: the scheduler went back over one, or "
                               "counts others than were drawn")
        return rollouts([self.requests[key] for key in keys], rows, version)

    # ---- a step --------------------------------------------------------------------------------------------------------

    def inputs(self, token_ids_T: Tensor, slot_T: Tensor, time_T: Tensor) -> Tensor:
        """Model inputs [T, D]: completion token `time_T` of each slot as it was drawn, or a prompt's token where that is
        negative."""
        is_drawn_T, place_T, buffers = time_T >= 0, time_T.clamp(min=0), self.buffers
        read_T = torch.where(is_drawn_T, buffers.read[slot_T, place_T], token_ids_T)
        record_T = {name: column[slot_T, place_T] for name, column in buffers.record.items()}
        return self.method.embed(read_T, buffers.latent[slot_T, place_T] & is_drawn_T, record_T or None)

    def prompt_inputs(self, token_ids_T: Tensor) -> Tensor:
        return self.method.embed(token_ids_T, torch.zeros_like(token_ids_T, dtype=torch.bool), None)

    def draw(self, hidden_BD: Tensor, weight_VD: Tensor, table_VD: Tensor, slot_B: Tensor, time_B: Tensor) -> Tensor:
        """Draw completion token `time_B` of each slot from its hidden state, write it down, and return its name [B]."""
        in_order_B = (time_B == self.buffers.length[slot_B]) | self.span_state["done"][slot_B] | (slot_B == self.nowhere)
        self.is_in_order &= in_order_B.all()
        counter_B3 = torch.cat([time_B[:, None], self.counter_S2[slot_B]], dim=1)
        view = look(hidden_BD, weight_VD, table_VD, self.method.needs, self.sampling, self.seed, counter_B3)
        span_state = {name: column[slot_B] for name, column in self.span_state.items()}
        state = {name: column[slot_B] for name, column in self.state.items()}
        settle(view, self.span, span_state, self.method, state, self.buffers, slot_B, time_B)
        for whole, rows in ((self.span_state, span_state), (self.state, state)):
            for name, column in whole.items():
                column[slot_B] = rows[name]
        name_B = 1 + (self.key_S[slot_B] + time_B * STRIDE) % self.num_names
        return torch.where(span_state["done"], LAST, name_B)
