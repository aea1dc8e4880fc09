"""The text of `--help`: every option with its default, explained by the docstring beneath the field.

Docstrings of fields are not kept at run time, so the source of each dataclass is parsed, here and nowhere else.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from fastlatent.config import family, member_schema, section_of
from fastlatent.schema import FAMILIES, Config

WIDTH = 110


def help_text() -> str:
    """The options of the schema, and each family with its members and their options."""
    blocks = ["options, with their defaults:\n"]
    blocks += [_entry(path, default, doc) for path, default, doc in options(Config) if path not in FAMILIES]
    docs = field_docs(Config)
    for key in FAMILIES:
        names = family(key).names()
        prefix = f"{key}.0" if key == "rewards" else key
        blocks.append(f"\n{prefix}.name: {', '.join(names)}, or a dotted path to your own\n{_indented(docs[key])}")
        for name in names:
            own = [entry for entry in options(member_schema(key, name, key), prefix) if entry[0] != f"{prefix}.name"]
            blocks.append(f"\n{prefix}.name={name}" + ("" if own else "  (no options)"))
            blocks += [_entry(*entry) for entry in own]
    return "\n".join(blocks)


def options(schema: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Dotted path, default and docstring of every field of a dataclass, those of its sections included."""
    docs, hints = field_docs(schema), typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        path = f"{prefix}.{field.name}" if prefix else field.name
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        section = section_of(hints[field.name])
        if section is None or default is None:
            yield path, default, docs.get(field.name, "")
        if section is not None:
            yield from options(section, path)


def field_docs(schema: type) -> dict[str, str]:
    """The string literal beneath each field, by name; a subclass's wins."""
    docs: dict[str, str] = {}
    for cls in reversed([c for c in schema.__mro__ if dataclasses.is_dataclass(c)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
        for node, below in zip(body, body[1:], strict=False):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if isinstance(node, ast.AnnAssign) and is_text:
                docs[node.target.id] = " ".join(below.value.value.split())
    return docs


def _entry(path: str, default: Any, doc: str) -> str:
    return f"  {path}={_shown(default)}" + (f"\n{_indented(doc)}" if doc else "")


def _shown(default: Any) -> str:
    """A default the way one would type it."""
    if default is dataclasses.MISSING:
        return "...  (required)"
    if isinstance(default, str) and default.isprintable() and default:
        return default
    return json.dumps(default)


def _indented(doc: str) -> str:
    return textwrap.fill(doc, WIDTH, initial_indent="      ", subsequent_indent="      ")
