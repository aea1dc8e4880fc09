"""length: the soft overlong punishment of DAPO (arXiv:2503.14476, equation 13)."""

from __future__ import annotations

from dataclasses import dataclass

from fastlatent.errors import UserError
from fastlatent.rewards.base import REWARDS, RewardConfig, with_options


@dataclass(kw_only=True)
class LengthConfig(RewardConfig):
    name: str = "length"
    max_tokens: int = 1024
    """Completions of more tokens than this get -1; usually sampling.max_new_tokens."""
    cache_tokens: int = 256
    """Width of the ramp from 0 to -1 below max_tokens."""

    def __post_init__(self):
        if not 0 <= self.cache_tokens <= self.max_tokens:
            raise UserError(f"rewards: length: cache_tokens must lie in 0..max_tokens ({self.max_tokens}), "
                            f"got {self.cache_tokens}")


@REWARDS.register("length")
@with_options(LengthConfig)
def length(num_tokens: int, max_tokens: int = LengthConfig.max_tokens,
           cache_tokens: int = LengthConfig.cache_tokens) -> float:
    """0 up to `max_tokens - cache_tokens`, then linearly down to -1 at `max_tokens`, and -1 beyond."""
    if num_tokens > max_tokens:
        return -1.0
    overlong = num_tokens - (max_tokens - cache_tokens)
    return -overlong / cache_tokens if overlong > 0 else 0.0
