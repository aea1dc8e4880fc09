"""What a decode loop writes down for each completion, on the device, and the Rollouts made of it at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlatent.methods.base import Decision, RecordSpec, StepView
from fastlatent.rollout.thinking import Advance
from fastlatent.types import LatentTrace, Request, Rollout


READ = ("read", "target", "acted", "latent", "thinking", "logprob", "log_kept", "entropy", "latent_acted")
"""The columns that the host reads; the record and the latents' densities stay on the device."""


@dataclass(slots=True)
class Row:
    """What was written of one completion of n tokens."""

    columns: dict[str, Tensor]  # those of READ, each [n]
    latent_logprob_n: Tensor
    record: dict[str, Tensor]  # [n, ...]
    final: dict[str, Tensor]  # scalars: how it ended

    def copy(self) -> Row:
        columns, record, final = ({k: v.clone() for k, v in d.items()} for d in (self.columns, self.record, self.final))
        return Row(columns, self.latent_logprob_n.clone(), record, final)


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
              acted_B: Tensor) -> None:
        """Column `time_B` of each row; a row that is done writes behind its own length, where nobody reads."""
        self.read[slot_B, time_B] = advance.read_B
        self.target[slot_B, time_B] = torch.where(acted_B, view.token_B, advance.read_B)
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

    def park(self, slot_B: Tensor | int, span: dict[str, Tensor]) -> None:
        """Keep how each row ended before the row is dropped."""
        for name, column in self.final.items():
            column[slot_B] = span[name]

    @property
    def size_bytes(self) -> int:
        columns = [value for value in vars(self).values() if isinstance(value, Tensor)]
        return sum(c.nbytes for c in (*columns, *self.record.values(), *self.final.values()))

    def row(self, slot: int, length: int) -> Row:
        """Views of one completion's tokens, and of how it ended."""
        return Row(
            {name: getattr(self, name)[slot, :length] for name in READ}, self.latent_logprob[slot, :length],
            {name: column[slot, :length] for name, column in self.record.items()},
            {name: column[slot] for name, column in self.final.items()})

    def rollouts(self, requests: Sequence[Request], version: int) -> list[Rollout]:
        """The completions of these requests, whose rows are the first ones in order."""
        length = self.length[: len(requests)].tolist()
        return rollouts(requests, [self.row(slot, n) for slot, n in enumerate(length)], version)


def rollouts(requests: Sequence[Request], rows: list[Row], version: int) -> list[Rollout]:
    """The completions of these requests, whose rows are read together; `rows` is emptied, so that a record is held twice only
    while its trace is made."""
    if not rows:
        return []
    lengths = [len(row.latent_logprob_n) for row in rows]
    host = {name: torch.cat([row.columns[name] for row in rows]).tolist() for name in READ}
    final = {name: torch.stack([row.final[name] for row in rows]).tolist() for name in rows[0].final}
    out, start = [], 0
    for index, (request, n) in enumerate(zip(requests, lengths, strict=True)):
        own = {name: column[start : start + n] for name, column in host.items()}
        out.append(Rollout(
            request=request, token_ids=own["read"], target_ids=own["target"], acted=own["acted"], latent=own["latent"],
            thinking=own["thinking"], logprobs=own["logprob"], log_kept=own["log_kept"], entropy=own["entropy"],
            trace=_trace(rows.pop(0), own["latent"]), finish="stop" if final["stopped"][index] else "length",
            forced_end=final["forced_end"][index], version=version, latent_acted=own["latent_acted"]))
        start += n
    return out


def _trace(row: Row, latent: list[bool]) -> LatentTrace | None:
    places = [k for k, is_latent in enumerate(latent) if is_latent]
    if not places:
        return None
    place_N = torch.tensor(places, device=row.latent_logprob_n.device)
    return LatentTrace(
        place_N.int(), row.latent_logprob_n[place_N], {name: column[place_N] for name, column in row.record.items()})
