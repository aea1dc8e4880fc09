"""From a reward's name and options to a function that is ready to be called, or one sentence that says why not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from fastlatent.errors import UserError
from fastlatent.rewards.base import REWARDS, RESERVED

JOB_ARGUMENTS = ("prompt", "completion", "answer")


@dataclass(slots=True)
class Reward:
    """A reward function, its options, and which arguments it takes."""

    function: Callable[..., Any]
    options: dict[str, Any]
    takes: frozenset[str] | None  # None: takes **kwargs, so everything

    def __call__(self, arguments: dict[str, Any]) -> Any:
        """Call with those of `arguments` and of the options that the function takes; an option hides a column."""
        if self.takes is not None:
            arguments = {name: value for name, value in arguments.items() if name in self.takes}
        return self.function(**(arguments | self.options))


def load_reward(path: str, options: dict[str, Any], where: str, columns: Collection[str] | None) -> Reward:
    """Find, check and warm up the reward called `path`.

    Args:
        where: the config key of the entry, for messages.
        columns: names of the data's columns, or None where they are not known yet.

    Raises:
        UserError: it cannot be imported, is no function, or asks for arguments that nobody will give.
    """
    function = REWARDS.find(path, f"{where}.name")
    try:
        warm_up = getattr(function, "warm_up", None)
        if warm_up is not None:
            warm_up()
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a user's function may raise anything
        raise UserError(f"{where}.name: warming up {path!r} failed with {type(error).__name__}: {error}") from error
    return Reward(function, options, _taken(function, path, options, where, columns))


def _taken(function: Any, path: str, options: dict[str, Any], where: str,
           columns: Collection[str] | None) -> frozenset[str] | None:
    """Names of the arguments `function` takes, None for all; UserError where a call is bound to fail."""
    if not callable(function):
        raise UserError(f"{where}.name: {path!r} is a {type(function).__name__}, wanted a function "
                        "f(prompt, completion, answer, **columns)")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise UserError(f"{where}.name: {path!r} has no signature to read; wrap it in a function "
                        "f(prompt, completion, answer, **columns)") from None
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    given = {*JOB_ARGUMENTS, *RESERVED, *options}
    wanted = [p.name for p in parameters
              if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in given]
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if positional or not (takes_all or named.keys() & {*JOB_ARGUMENTS, *RESERVED}):
        raise UserError(f"{where}.name: {path}{inspect.signature(function)} must take its arguments by the names "
                        "prompt, completion, answer (those it needs)")
    unknown = [name for name in wanted if columns is not None and name not in columns]
    if unknown:
        raise UserError(f"{where}.name: {path} wants a column {unknown[0]!r}; the data has "
                        f"{', '.join(sorted(columns)) or 'none'}")
    useless = [name for name in options if not takes_all and name not in named]
    if useless:
        raise UserError(f"{where}.{useless[0]}: {path} takes no such option")
    return None if takes_all else frozenset(named)
