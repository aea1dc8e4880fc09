"""What a reward is: a plain function of prompt, completion and answer, and the options it is configured with.

    def my_reward(prompt: str, completion: str, answer: str, **columns) -> float | None

Arguments are passed by name, and only those the function takes: the three above, its own options, the row's own
columns, and the columns of `RESERVED`. None means that there is no reward to be had for this completion. A function
may carry two attributes: `Config`, its options (see `with_options`), and `warm_up`, called once at a worker's start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from fastlatent.registry import Family

REWARDS = Family("fastlatent.rewards", "reward")

RESERVED = {
    "forced_end": "bool: the end of thinking was written by the engine, not by the policy",
    "finish": "'stop', or 'length' where the completion was cut",
    "num_tokens": "tokens of the completion",
    "num_thinking": "tokens of it drawn while thinking",
    "thinking_end": "the delimiter that ends thinking",
}
"""Columns the trainer gives every reward function; they win over columns of the data with the same name."""

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(kw_only=True)
class RewardConfig:
    """What every entry of `rewards` has. A function with options of its own carries a subclass, see `with_options`."""

    name: str
    """A built-in reward, or the dotted path of your own function: `my_module.my_reward`."""
    weight: float = 1.0
    """Factor in the sum of rewards; 0 only logs it."""
    timeout_s: float = 5.0
    """Longest one call may take; its worker is then killed and the reward counts as missing."""


def with_options(config: type[RewardConfig]) -> Callable[[Function], Function]:
    """Decorator: the fields `config` adds to RewardConfig are keyword arguments of the function."""

    def attach(function: Function) -> Function:
        function.Config = config
        return function

    return attach


@dataclass(slots=True)
class RewardJob:
    """One completion to score. `columns`: the row's own and those of RESERVED; what JSON cannot carry becomes str."""

    prompt: str
    completion: str
    answer: str
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class RewardResult:
    """What the reward functions said of one completion."""

    values: dict[str, float | None]  # each function's reward by name, in the order configured; None where missing
    total: float  # sum of weight * reward; NaN where a reward with a weight is missing


@dataclass(slots=True)
class RewardReport:
    """Why rewards of one `RewardPool.score` call are missing."""

    num_timeouts: int = 0
    num_crashes: int = 0  # the worker died: os._exit, a segmentation fault, the kernel's OOM killer
    num_memory_errors: int = 0  # the call wanted more than the pool's memory_mb
    num_exceptions: int = 0
    num_invalid: int = 0  # returned NaN, an infinity, or something that is no number
    num_none: int = 0  # returned None: no failure, the function has nothing to say
    errors: list[str] = field(default_factory=list)  # the first few messages

    def counters(self) -> dict[str, int]:
        """The counts for the log: timeouts, crashes, memory_errors, exceptions, invalid, none."""
        return {field.name.removeprefix("num_"): getattr(self, field.name)
                for field in fields(self) if field.name.startswith("num_")}


def unique_names(configs: Sequence[RewardConfig]) -> list[str]:
    """What each reward is called in results and logs: the last part of its name, numbered where that is taken."""
    names: list[str] = []
    for config in configs:
        base = config.name.replace(":", ".").rpartition(".")[2]
        number, name = 1, base
        while name in names:
            number += 1
            name = f"{base}_{number}"
        names.append(name)
    return names
