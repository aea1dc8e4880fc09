"""format: 1 where the completion thinks, ends thinking once by itself, and answers."""

from __future__ import annotations

from fastlatent.rewards.base import REWARDS


@REWARDS.register("format")
def format_reward(completion: str, thinking_end: str = "####", forced_end: bool = False) -> float:
    """1.0 with exactly one delimiter, text on both sides of it, and not written by the engine; else 0.0."""
    before, _, after = completion.partition(thinking_end)
    has_one_end = completion.count(thinking_end) == 1
    return float(has_one_end and not forced_end and bool(before.strip()) and bool(after.strip()))
