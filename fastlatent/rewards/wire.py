"""What the pool says to a worker: one set-up message, then one message per completion. All of it is JSON."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, fields
from typing import Any

from fastlatent.rewards.base import RewardConfig, RewardJob


def setup_message(configs: Sequence[RewardConfig], columns: Collection[str] | None, memory_mb: int) -> dict[str, Any]:
    """Which rewards to load: for each the keyword arguments of `load_reward`, but for `columns`, which they share."""
    common = {field.name for field in fields(RewardConfig)}
    rewards = [{"path": config.name, "where": f"rewards.{index}",
                "options": {name: value for name, value in asdict(config).items() if name not in common}}
               for index, config in enumerate(configs)]
    return {"rewards": rewards, "columns": None if columns is None else sorted(columns), "memory_mb": memory_mb}


def job_message(job: RewardJob, start: int) -> dict[str, Any]:
    """Score `job` with rewards `start` and up. Prompt, completion and answer win over columns called so."""
    columns = {str(name): _jsonable(value) for name, value in job.columns.items()}
    return {"start": start,
            "arguments": {**columns, "prompt": job.prompt, "completion": job.completion, "answer": job.answer}}


def _jsonable(value: Any) -> Any:
    """`value`, or its str() where JSON cannot carry it."""
    if value is None or isinstance(value, str | int | float):
        return value
    try:
        return json.loads(json.dumps(value, default=str))
    except (TypeError, ValueError, RecursionError):  # keys that are no names, a circle, a very deep nest
        return str(value)
