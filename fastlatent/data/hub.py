"""Datasets of the Hugging Face hub by name, or of a local folder, through the `datasets` package."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

from fastlatent.data.base import DATASETS, Dataset, Example
from fastlatent.data.rows import RowsConfig, read_row
from fastlatent.errors import UserError


@DATASETS.register("hub")
class Hub(Dataset):
    """Ids count rows: those of `split` from 0, then those of `held_out_split`."""

    @dataclass(kw_only=True)
    class Config(RowsConfig):
        name: str = "hub"
        path: str = ""
        """Name on the hub (openai/gsm8k) or a folder of data files."""
        config: Optional[str] = None
        """Configuration of the dataset, where it has several (main)."""
        split: str = "train"
        """Split to train on; slices as `datasets` writes them work (train[:90%])."""
        held_out_split: Optional[str] = None
        """Split to evaluate on."""
        revision: Optional[str] = None
        """Branch, tag or commit on the hub; a commit makes a run repeatable."""

    def __init__(self, config: Config, seed: int):
        super().__init__(config, seed)
        if not config.path:
            raise UserError("data.path: wanted the name of a dataset on the hub or a folder")
        self.train = _read(config, config.split, 0)
        self.held_out = _read(config, config.held_out_split, len(self.train)) if config.held_out_split else []


def _read(config: Hub.Config, split: str, first_id: int) -> Sequence[Example]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise UserError("data.name: 'hub' needs the package datasets: pip install 'fastlatent[data]'") from None
    # a dataset that is a script is refused by `datasets` itself, from version 4 on
    try:
        rows = datasets.load_dataset(config.path, config.config, split=split, revision=config.revision)
    # OSError: unknown, or no network; ValueError: no such split or configuration; DatasetsError: files it cannot parse
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = textwrap.shorten(str(error.__cause__ or error), 300) or type(error).__name__
        raise UserError(f"data.path: split {split!r} of {config.path!r} cannot be read ({reason})") from None
    if not len(rows):
        raise UserError(f"data.path: split {split!r} of {config.path!r} holds no rows")
    where = f"{config.path}, split {split}, row"
    return [read_row(row, first_id + i, f"{where} {i}", config) for i, row in enumerate(rows)]
