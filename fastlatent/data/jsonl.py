"""One's own questions: a file with one JSON object per line."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from typing import Any, Optional

from fastlatent.data.base import DATASETS, Dataset, Example
from fastlatent.data.rows import RowsConfig, read_row
from fastlatent.errors import UserError


@DATASETS.register("jsonl")
class Jsonl(Dataset):
    """Ids count rows: those of `train` from 0, then those held out."""

    @dataclass(kw_only=True)
    class Config(RowsConfig):
        name: str = "jsonl"
        train: str = ""
        """File to train on, one JSON object per line; blank lines are skipped."""
        held_out: Optional[str] = None
        """File to evaluate on."""
        held_out_size: int = 0
        """Without `held_out`: hold out this many rows from the end of `train`."""

    def __init__(self, config: Config, seed: int):
        super().__init__(config, seed)
        if not config.train:
            raise UserError("data.train: wanted a file with one JSON object per line")
        if config.held_out and config.held_out_size:
            raise UserError("data.held_out_size: rows come from the end of data.train or from data.held_out, not both")
        rows = read_jsonl(config.train, 0, config)
        if not 0 <= config.held_out_size < len(rows):
            raise UserError(f"data.held_out_size: wanted 0 to {len(rows) - 1}, as {config.train} has {len(rows)} "
                            f"rows, got {config.held_out_size}")
        num_train = len(rows) - config.held_out_size
        self.train = rows[:num_train]
        self.held_out = read_jsonl(config.held_out, num_train, config) if config.held_out else rows[num_train:]


def read_jsonl(path: str, first_id: int, config: RowsConfig) -> list[Example]:
    """Every row of the file, with ids from `first_id` on; UserError naming the line that is malformed."""
    examples = []
    try:
        with open(os.path.expanduser(path), "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    source = f"{path}, line {number}"
                    examples.append(read_row(_object(line, source), first_id + len(examples), source, config))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not examples:
        raise UserError(f"{path}: holds no rows; wanted one JSON object per line")
    return examples


def _object(line: bytes, source: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig").rstrip(), parse_constant=_refuse_constant, object_pairs_hook=_object_once)
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        where = f"{error.msg} at character {error.pos + 1}"
        raise UserError(f"{source}: not JSON ({where}); wanted one object per line") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{source}: wanted a JSON object, got {type(row).__name__}")
    # no tokenizer and no file takes half a surrogate pair; only an escape can bring one past the decoding above
    if rb"\u" in line and (half := re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False))):
        raise UserError(f"{source}: not Unicode: \\u{ord(half[0]):04x} is half a surrogate pair")
    return row


def _object_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two values under one name: which is meant, nobody can tell."""
    out: dict[str, Any] = {}
    for name, value in pairs:
        if name in out:
            raise ValueError(f"{name!r} is there twice")
        out[name] = value
    return out


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
