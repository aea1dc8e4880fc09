"""A microbatch that can be split in two where memory runs out, forward passes over many that do it, and the error where that is
not enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from fastlatent.errors import UserError
from fastlatent.packing import Item, pack
from fastlatent.schema import UpdateConfig
from fastlatent.types import Batch

LAID_OUT = ("score_A", "sequence_A", "target_A")
"""What packing makes of the items themselves; every other column of the scored tokens may have been computed since."""


class OutOfMemory(UserError):
    """A part of a microbatch that cannot be split again does not fit. `is_whole`: no weight had moved in this update."""

    is_whole = True


@dataclass(slots=True)
class Microbatch:
    items: Sequence[Item]
    batch: Batch  # of these items
    share_prompts: bool
    is_half: bool = False

    @classmethod
    def of(cls, items: Sequence[Item], device: torch.device, share_prompts: bool) -> Microbatch:
        return cls(items, pack(items, device, share_prompts), share_prompts)

    def halves(self, config: UpdateConfig, phase: str = "update") -> tuple[Microbatch, Microbatch]:
        """The same completions in two batches of about as many tokens, their weights and log-probabilities as they are now.

        OutOfMemory, which names the `phase`, where this is a half already, or a single completion.
        """
        if self.is_half or len(self.items) < 2:
            # nothing is kept for a backward pass but in the update
            recompute = ", model.gradient_checkpointing=true" if phase == "update" else ""
            raise OutOfMemory(
                f"{phase}: out of memory for {self.batch.num_tokens} packed tokens, "
                f"{'half of a microbatch' if self.is_half else 'a single completion'}; wanted update.tokens_per_microbatch "
                f"below {config.tokens_per_microbatch}{recompute} or a smaller sampling.max_new_tokens")
        if self.batch.score_A.is_cuda:
            torch.cuda.empty_cache()  # of what was left of the pass that failed
        read = list(accumulate(item.num_inputs for item in self.items))
        cut = min(range(1, len(self.items)), key=lambda cut: abs(2 * read[cut - 1] - read[-1]))
        num_scored = sum(item.num_actions for item in self.items[:cut])
        return self._part(self.items[:cut], slice(0, num_scored)), self._part(self.items[cut:], slice(num_scored, None))

    def _part(self, items: Sequence[Item], rows: slice) -> Microbatch:
        # completions are laid down in order, so a part's scored tokens are a slice
        out = Microbatch.of(items, self.batch.score_A.device, self.share_prompts)
        for name in Batch.__slots__:
            if name.endswith("_A") and name not in LAID_OUT and (column_A := getattr(self.batch, name)) is not None:
                setattr(out.batch, name, column_A[rows])
        out.is_half = True
        return out


def read_each(parts: list[Microbatch], read: Callable[[Batch], None], config: UpdateConfig, phase: str) -> int:
    """Call `read`, a forward pass without gradient, with each batch; how many of them had to be split.

    A microbatch for which memory runs out makes way for its halves in `parts`, as what learns from it needs more still;
    OutOfMemory where it was split before, or cannot be.
    """
    num_splits = index = 0
    while index < len(parts):
        if _fits(parts[index].batch, read):
            index += 1
        else:
            parts[index : index + 1] = parts[index].halves(config, phase)
            num_splits += 1
    return num_splits


def _fits(batch: Batch, read: Callable[[Batch], None]) -> bool:
    try:
        read(batch)
    except torch.OutOfMemoryError:
        return False  # with the error go its frames, which hold the activations
    return True
