"""What a decode loop writes down for each completion, on the device, and the Rollouts made of it at the end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlatent.methods.base import Decision, RecordSpec, StepView
from fastlatent.rollout.thinking import Advance
from fastlatent.types import LatentTrace, Request, Rollout


class Buffers:
    """One row a completion, one column a token; sized once, written at (slot, time), read back once."""

    def __init__(self, num_slots: int, max_new: int, spec: RecordSpec, device: torch.device):
        def new(dtype, *shape):
            return torch.zeros((num_slots, max_new, *shape), dtype=dtype, device=device)

        self.read, self.target = new(torch.int64), new(torch.int64)
        self.acted, self.latent, self.thinking = new(torch.bool), new(torch.bool), new(torch.bool)
        self.logprob, self.log_kept, self.entropy = new(torch.float32), new(torch.float32), new(torch.float32)
        self.latent_logprob, self.latent_acted = new(torch.float32), new(torch.bool)
        self.record = {name: new(dtype, *shape) for name, (shape, dtype) in spec.items()}
        self.length = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.final = {name: torch.zeros(num_slots, dtype=torch.bool, device=device) for name in ("stopped", "forced_end")}

    def write(self, slot_B: Tensor, time_B: Tensor, live_B: Tensor, view: StepView, advance: Advance, decision: Decision,
              read_B: Tensor, acted_B: Tensor) -> None:
        """Column `time_B` of each row; a row that is done writes behind its own length, where nobody reads."""
        self.read[slot_B, time_B] = read_B
        self.target[slot_B, time_B] = torch.where(acted_B, view.token_B, read_B)
        self.acted[slot_B, time_B] = acted_B
        self.latent[slot_B, time_B] = decision.latent_B
        self.thinking[slot_B, time_B] = advance.drawn_thinking_B
        logprob_B, log_kept_B = view.logprob_B, view.log_kept_B
        if decision.latent_logprob_B is not None:
            logprob_B = torch.where(decision.latent_B, decision.latent_logprob_B, logprob_B)
            log_kept_B = torch.where(decision.latent_B, 0.0, log_kept_B)
            self.latent_logprob[slot_B, time_B] = decision.latent_logprob_B
            self.latent_acted[slot_B, time_B] = decision.latent_B & acted_B
        self.logprob[slot_B, time_B] = torch.where(acted_B, logprob_B, 0.0)
        self.log_kept[slot_B, time_B] = torch.where(acted_B, log_kept_B, 0.0)
        self.entropy[slot_B, time_B] = view.entropy_B
        for name, column in self.record.items():
            column[slot_B, time_B] = decision.record[name].to(column.dtype)
        self.length[slot_B] += live_B

    def park(self, slot_B: Tensor, span: dict[str, Tensor]) -> None:
        """Keep how each row ended before the row is dropped."""
        for name, column in self.final.items():
            column[slot_B] = span[name]

    @property
    def size_bytes(self) -> int:
        columns = [value for value in vars(self).values() if isinstance(value, Tensor)]
        return sum(c.nbytes for c in (*columns, *self.record.values(), *self.final.values()))

    def rollouts(self, requests: Sequence[Request], version: int, slot_B: Tensor | None = None) -> list[Rollout]:
        """The completions of these requests; theirs are the slots `slot_B`, or the first ones in order."""
        slot_B = torch.arange(len(requests), device=self.length.device) if slot_B is None else slot_B
        length = self.length[slot_B].tolist()
        longest = max(length)
        host = {name: getattr(self, name)[slot_B, :longest].tolist()
                for name in ("read", "target", "acted", "latent", "thinking", "logprob", "log_kept", "entropy", "latent_acted")}
        final = {name: column[slot_B].tolist() for name, column in self.final.items()}
        out = []
        for row, (request, slot, n) in enumerate(zip(requests, slot_B.tolist(), length, strict=True)):
            rows = {name: column[row][:n] for name, column in host.items()}
            out.append(Rollout(
                request=request, token_ids=rows["read"], target_ids=rows["target"], acted=rows["acted"],
                latent=rows["latent"], thinking=rows["thinking"], logprobs=rows["logprob"], log_kept=rows["log_kept"],
                entropy=rows["entropy"], trace=self._trace(slot, rows["latent"]),
                finish="stop" if final["stopped"][row] else "length", forced_end=final["forced_end"][row],
                version=version, latent_acted=rows["latent_acted"]))
        return out

    def _trace(self, slot: int, latent: list[bool]) -> LatentTrace | None:
        places = [k for k, is_latent in enumerate(latent) if is_latent]
        if not places:
            return None
        place_N = torch.tensor(places, device=self.length.device)
        return LatentTrace(
            place_N.int(), self.latent_logprob[slot, place_N],
            {name: column[slot, place_N] for name, column in self.record.items()})
