"""Rollouts become microbatches: sequences back to back under a token budget, positions from 0, no pads anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlatent.errors import UserError
from fastlatent.types import Batch, LatentActions, LatentTrace, Rollout, Varlen


@dataclass(slots=True)
class Item:
    """One rollout on its way into a batch. `weight` multiplies each acted token's loss; 0 keeps the rollout out."""

    rollout: Rollout
    advantage: float | Sequence[float]  # of every action, or of each
    weight: float

    @property
    def num_actions(self) -> int:
        return sum(self.rollout.acted)

    @property
    def advantages(self) -> list[float]:
        """One number for each action."""
        return list(self.advantage) if isinstance(self.advantage, Sequence) else [self.advantage] * self.num_actions

    @property
    def teaches(self) -> bool:
        """Whether any advantage is not 0."""
        return any(self.advantage) if isinstance(self.advantage, Sequence) else self.advantage != 0

    @property
    def prompt_id(self) -> int:
        return self.rollout.request.prompt.id

    @property
    def num_prompt(self) -> int:
        return len(self.rollout.request.prompt.token_ids)

    @property
    def num_inputs(self) -> int:
        # nothing is predicted from the last token, so it is not read
        return self.num_prompt + len(self.rollout.token_ids) - 1


def varlen(lengths: Sequence[int], prefixes: Sequence[int | None] | None = None) -> Varlen:
    """The layout of segments of these lengths, in this order; `prefixes` names the segment each one continues, if any."""
    length_S = torch.tensor(lengths, dtype=torch.int64)
    end_S = length_S.cumsum(0)
    start_S = end_S - length_S
    longest = max(lengths)
    place_L = torch.arange(longest)
    inside_SL = place_L < length_S[:, None]
    unpack_SL = torch.where(inside_SL, start_S[:, None] + place_L, 0)
    repack_T = inside_SL.flatten().nonzero()[:, 0]
    out = Varlen(torch.cat([torch.zeros(1, dtype=torch.int64), end_S]).int(), longest, unpack_SL, repack_T)
    if prefixes is not None:
        owner_S = torch.tensor([0 if p is None else p for p in prefixes])
        prefix_length_S = torch.tensor([0 if p is None else lengths[p] for p in prefixes])
        place_P = torch.arange(int(prefix_length_S.max()))
        seen_SP = place_P < prefix_length_S[:, None]
        out.prefix_SP = torch.where(seen_SP, start_S[owner_S][:, None] + place_P, 0)
        causal_LL = place_L[:, None] >= place_L
        S = len(lengths)
        out.mask_SLK = torch.cat([seen_SP[:, None].expand(S, longest, -1), causal_LL.expand(S, longest, longest)], dim=2)
        key_length_S = prefix_length_S + length_S
        out.key_K = torch.cat([out.prefix_SP, unpack_SL], dim=1)[torch.cat([seen_SP, inside_SL], dim=1)]
        out.cu_seqlens_k = torch.cat([torch.zeros(1, dtype=torch.int64), key_length_S.cumsum(0)]).int()
        out.max_seqlen_k = int(key_length_S.max())
    return out


def microbatches(items: Sequence[Item], budget: int, share_prompts: bool) -> list[list[Item]]:
    """Items in as few batches of at most `budget` tokens as first-fit on the sorted lengths finds; order is deterministic.

    With `share_prompts` siblings are kept side by side and a prompt is counted once for all of them in a batch.
    """
    out: list[list[Item]] = []
    room: list[int] = []
    if share_prompts:
        # filled one after the other: siblings part only where a batch is full
        for item in _by_group(items):
            shares = bool(out) and out[-1][-1].prompt_id == item.prompt_id
            cost = item.num_inputs - (item.num_prompt if shares else 0)
            if not out or cost > room[-1]:
                out.append([])
                room.append(budget)
                cost = item.num_inputs
            _check_fits(item, budget)
            out[-1].append(item)
            room[-1] -= cost
        return out
    for item in sorted(items, key=lambda item: -item.num_inputs):
        _check_fits(item, budget)
        index = next((i for i, left in enumerate(room) if item.num_inputs <= left), len(out))
        if index == len(out):
            out.append([])
            room.append(budget)
        out[index].append(item)
        room[index] -= item.num_inputs
    return out


def _by_group(items: Sequence[Item]) -> list[Item]:
    """Siblings side by side, groups of long completions first, so that a batch holds similar lengths."""
    longest: dict[int, int] = {}
    for item in items:
        longest[item.prompt_id] = max(longest.get(item.prompt_id, 0), item.num_inputs)
    return sorted(items, key=lambda item: (-longest[item.prompt_id], item.prompt_id))


def _check_fits(item: Item, budget: int) -> None:
    if item.num_inputs > budget:
        raise UserError(f"update.tokens_per_microbatch: a sequence of {item.num_inputs} tokens does not fit into {budget}")


def pack(items: Sequence[Item], device: torch.device, share_prompts: bool = False) -> Batch:
    """One Batch of the items, in their order. `weight` must already hold the step's global normaliser.

    With `share_prompts` a prompt is laid down once, as a segment of its own, and its siblings' completions name it as prefix.
    """
    lengths: list[int] = []
    prefixes: list[int | None] = []
    prompt_at: dict[int, tuple[int, int]] = {}  # prompt id -> (its segment, the place of its last token)
    token_ids: list[int] = []
    position: list[int] = []
    latent: list[bool] = []
    score: list[int] = []
    sequence: list[int] = []
    fields: dict[str, list] = {name: [] for name in ("target", "logprob", "advantage", "weight")}
    traces: list[tuple[int, int, LatentTrace]] = []  # first place, rows that are read, their source

    def lay(ids: Sequence[int], first_position: int, is_latent: Sequence[bool]) -> None:
        token_ids.extend(ids)
        position.extend(range(first_position, first_position + len(ids)))
        latent.extend(is_latent)

    for index, item in enumerate(items):
        rollout, prompt = item.rollout, item.rollout.request.prompt.token_ids
        P, C = len(prompt), len(rollout.token_ids)
        segment, last = prompt_at.get(item.prompt_id, (None, None)) if share_prompts else (None, None)
        if segment is None:
            segment, last = len(lengths), len(token_ids) + P - 1
            prompt_at[item.prompt_id] = segment, last
            lay(prompt, 0, [False] * P)
            lengths.append(P)
            prefixes.append(None)
        start = len(token_ids)
        lay(rollout.token_ids[: C - 1], P, rollout.latent[: C - 1])
        if not share_prompts:
            lengths[-1] += C - 1
        elif C > 1:
            lengths.append(C - 1)
            prefixes.append(segment)
        acted = [k for k in range(C) if rollout.acted[k]]
        score += [start + k - 1 if k else last for k in acted]  # token k is predicted by the place before it
        sequence += [index] * len(acted)
        fields["target"] += [rollout.target_ids[k] for k in acted]
        fields["logprob"] += [rollout.logprobs[k] for k in acted]
        fields["advantage"] += item.advantages
        fields["weight"] += [item.weight] * len(acted)
        # the last token of a completion is not read, nor is its row of the record
        if rollout.trace is not None and (num_read := sum(rollout.latent[: C - 1])):
            traces.append((start, num_read, rollout.trace))
    T = len(token_ids)
    batch = Batch(
        token_ids_T=torch.tensor(token_ids), position_T=torch.tensor(position), latent_T=torch.tensor(latent),
        record_T=None, varlen=varlen(lengths, prefixes if share_prompts and any(p is not None for p in prefixes) else None),
        score_A=torch.tensor(score), sequence_A=torch.tensor(sequence), target_A=torch.tensor(fields["target"]),
        behaviour_logprob_A=torch.tensor(fields["logprob"], dtype=torch.float32),
        advantage_A=torch.tensor(fields["advantage"], dtype=torch.float32),
        weight_A=torch.tensor(fields["weight"], dtype=torch.float32), num_tokens=T).to(device)
    batch.record_T = _lay_out(traces, T, device)
    batch.actions = _latent_actions(items, device)
    return batch


def _latent_actions(items: Sequence[Item], device: torch.device) -> LatentActions | None:
    """Which actions are latents, in packed order, with the records they were drawn as."""
    is_latent: list[bool] = []
    rows: dict[str, list[Tensor]] = {}
    for rollout in (item.rollout for item in items):
        drawn = rollout.latent_acted or [False] * len(rollout.acted)
        is_latent += [is_drawn for is_drawn, acted in zip(drawn, rollout.acted, strict=True) if acted]
        if not any(drawn):
            continue
        kept_N = torch.tensor([is_drawn for is_drawn, read in zip(drawn, rollout.latent, strict=True) if read])
        for name, column in rollout.trace.record.items():
            rows.setdefault(name, []).append(column[kept_N.to(column.device)].to(device))
    if not rows:
        return None
    places = [[a for a, flag in enumerate(is_latent) if flag == wanted] for wanted in (True, False)]
    latent_N, token_M = (torch.tensor(place, dtype=torch.int64, device=device) for place in places)
    return LatentActions(latent_N, token_M, {name: torch.cat(columns) for name, columns in rows.items()})


def _lay_out(traces: Sequence[tuple[int, int, LatentTrace]], T: int, device: torch.device) -> dict[str, Tensor] | None:
    """Each trace's record rows at the packed positions where their tokens are read, zeros elsewhere."""
    if not traces:
        return None
    place_N = torch.cat([start + trace.position_N[:num].long() for start, num, trace in traces]).to(device)
    out = {}
    for name, first in traces[0][2].record.items():
        out[name] = torch.zeros(T, *first.shape[1:], dtype=first.dtype, device=device)
        out[name][place_N] = torch.cat([trace.record[name][:num] for _, num, trace in traces]).to(device)
    return out
