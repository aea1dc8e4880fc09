"""What a dataset is: examples to train on, examples held out, and a fingerprint of them all.

A dataset is a class of this folder, registered under its name, with a nested `Config`; it reads everything it needs,
and refuses what is malformed, when it is constructed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from fastlatent.registry import Family

DATASETS = Family("fastlatent.data", "dataset")


@dataclass(frozen=True, slots=True)
class Example:
    """One question and the answer it should get."""

    id: int  # unique over train and held_out, 0 to 2**32 - 1: it keys the noise of the example's rollouts
    question: str
    answer: str
    columns: dict[str, Any] = field(default_factory=dict)  # what else the row holds; reaches the reward functions
    source: str = ""  # where it was read, for error messages: 'train.jsonl, line 17'


@dataclass(kw_only=True)
class DataConfig:
    name: str = "jsonl"
    """Which dataset: a member of fastlatent.data or a dotted path to a Dataset class."""


class Dataset:
    """Subclasses set `train` and `held_out` in their constructor; both know their length and are read by index.

    `seed` is the run's, for a dataset that draws its problems; what is held out must not depend on it.
    """

    Config = DataConfig
    train: Sequence[Example]
    held_out: Sequence[Example]

    def __init__(self, config: DataConfig, seed: int):
        self.config, self.seed = config, seed

    def fingerprint(self) -> str:
        """sha256 over every example in order. A column value that JSON cannot hold counts by its type alone."""
        digest = hashlib.sha256(f"{len(self.train)} {len(self.held_out)}\n".encode())
        for example in chain(self.train, self.held_out):
            row = [example.id, example.question, example.answer, example.columns]
            digest.update(json.dumps(row, sort_keys=True, default=lambda value: type(value).__name__).encode() + b"\n")
        return digest.hexdigest()
