"""From a row, a dictionary that came from outside, to an Example: the checks that every reader shares."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Optional

from fastlatent.data.base import DataConfig, Example
from fastlatent.errors import UserError


@dataclass(kw_only=True)
class RowsConfig(DataConfig):
    question: str = "question"
    """Column with the question."""
    answer: str = "answer"
    """Column with the answer, a text or a number; a number becomes its text."""
    answer_after: Optional[str] = None
    """Keep of the answer only what follows the last of this string: '####' for GSM8K's own files."""


def read_row(row: dict[str, Any], id: int, source: str, config: RowsConfig) -> Example:
    """The example in `row`; every other column passes through. UserError naming `source` where it is malformed."""
    question, answer = (_column(row, name, source) for name in (config.question, config.answer))
    if not isinstance(question, str) or not question.strip():
        came = "an empty text" if isinstance(question, str) else type(question).__name__
        raise UserError(f"{source}: column {config.question!r}: wanted the question as a text, got {came}")
    # bool is an int to Python, and no answer
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise UserError(f"{source}: column {config.answer!r}: wanted a text or a number, got {type(answer).__name__}")
    answer = str(answer)
    if config.answer_after:
        _, delimiter, answer = answer.rpartition(config.answer_after)
        if not delimiter:
            raise UserError(f"{source}: column {config.answer!r} holds no data.answer_after={config.answer_after!r}")
    answer = answer.strip()
    if not answer:
        raise UserError(f"{source}: column {config.answer!r}: the answer is empty")
    columns = {name: value for name, value in row.items() if name not in (config.question, config.answer)}
    return Example(id, question, answer, columns, source)


def _column(row: dict[str, Any], name: str, source: str) -> Any:
    if name in row:
        return row[name]
    near = difflib.get_close_matches(name, row, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(sorted(row)) or 'none'}"
    raise UserError(f"{source}: there is no column {name!r}{hint}")
