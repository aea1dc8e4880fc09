"""From recipe names, yaml files and `key=value` overrides to one plain tree of options, not yet checked.

Layers merge left to right, then the overrides. `base: other` in a file puts another recipe or file beneath it. A layer
that chooses another member of a family (`method.name`) replaces that section: its options belonged to the old member.
"""

from __future__ import annotations

import difflib
import io
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from yaml import YAMLError

from fastlatent.errors import UserError
from fastlatent.schema import FAMILIES, Config

Tree = dict[str, Any]


def read_layers(layers: Sequence[str | Path], overrides: Sequence[str]) -> Tree:
    """The merged tree; `recipe` is the last layer's stem where no layer sets it."""
    tree = family_defaults()
    for layer in layers:
        for part in _read(layer if isinstance(layer, Path) else _layer_path(layer, Path()), ()):
            tree = merge_layer(tree, part)
    if layers and "recipe" not in tree:
        tree["recipe"] = Path(layers[-1]).stem
    # names first: `method.r_min=0.9 method.name=hrpo` must mean the same in either order
    for text in sorted(overrides, key=lambda text: not _chooses_member(text.partition("=")[0])):
        tree = _override(tree, text)
    return tree


def is_override(text: str | Path) -> bool:
    """Whether a command-line word is `dotted.key=value`; a path may hold '=' after its first slash."""
    return isinstance(text, str) and re.match(r"\w[\w.]*=", text) is not None


def family_defaults() -> Tree:
    """The sections that are chosen by name, as the schema has them."""
    return {f.name: f.default_factory() for f in fields(Config) if f.name in FAMILIES}


def merge_layer(tree: Tree, layer: Tree) -> Tree:
    """`layer` over `tree`, as a new tree."""
    out = _merge(tree, layer)
    for key in FAMILIES:
        if isinstance(tree.get(key), dict) and isinstance(layer.get(key), dict):
            out[key] = _merge_member(tree[key], layer[key])
    return out


# ---- recipes and files ----------------------------------------------------------------------------------------------


def recipes() -> dict[str, str]:
    """Name and description (the first comment line) of every recipe that ships with the package."""
    paths = sorted(_recipe_folder().glob("*.yaml"))
    return {path.stem: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for path in paths}


def _recipe_folder() -> Path:
    return Path(str(resources.files("fastlatent"))) / "recipes"


def _layer_path(name: str, folder: Path) -> Path:
    """The file called `name`: a path, relative to `folder`, where it looks like one, else a recipe."""
    if name.endswith((".yaml", ".yml")) or "/" in name or "\\" in name:
        return folder / os.path.expanduser(name)
    known = sorted(recipes())
    if name not in known:
        near = difflib.get_close_matches(name, known)
        hint = f"did you mean {' or '.join(near)}?" if near else f"recipes are {', '.join(known)}"
        raise UserError(f"{name!r} is not a recipe, a path to a yaml file or key=value; {hint}")
    return _recipe_folder() / f"{name}.yaml"


def _read(path: Path, above: tuple[Path, ...]) -> Iterable[Tree]:
    """The file's tree, after those it is based on. `above` holds the files whose `base` led here."""
    if path.resolve() in above:
        raise UserError(f"{path}: base: the file is based on itself")
    tree = _parse_file(path)
    base = tree.pop("base", None)
    if not isinstance(base, (str, type(None))):
        raise UserError(f"{path}: base: wanted the name of a recipe or a path, got {base!r}")
    if base is not None:
        yield from _read(_layer_path(base, path.parent), (*above, path.resolve()))
    yield tree


def _parse_file(path: Path) -> Tree:
    try:
        node = OmegaConf.load(io.StringIO(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid yaml: {getattr(error, 'problem', None) or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not valid yaml: wanted a text in UTF-8") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_reason(error)}") from None
    except OSError as error:  # OmegaConf raises a bare one for a lone number or word
        raise UserError(f"{path}: {error.strerror or 'wanted a mapping of options'}") from None
    if not isinstance(node, DictConfig):
        raise UserError(f"{path}: wanted a mapping of options, got a list")
    return OmegaConf.to_container(node, resolve=False)


# ---- overrides ------------------------------------------------------------------------------------------------------


def _chooses_member(key: str) -> bool:
    return re.fullmatch(rf"({'|'.join(FAMILIES)})(\.\d+)?(\.name)?", key) is not None


def _override(tree: Tree, text: str) -> Tree:
    """`tree` with one `dotted.key=value`; `rewards.0.weight=2` reaches into the list."""
    key, equals, value = text.partition("=")
    if not equals or not is_override(text):
        raise UserError(f"{text!r}: wanted an override of the form key=value")
    first, *rest = key.split(".")
    value = _parse_value(key, value)
    if first != "rewards" or not rest or not isinstance(tree["rewards"], list):
        return merge_layer(tree, _nest([first, *rest], value))
    entries, index = list(tree["rewards"]), rest[0]
    if not index.isdecimal() or int(index) >= len(entries):
        raise UserError(f"{key}: wanted rewards.N with N below {len(entries)}, the length of the list")
    old = entries[int(index)]
    new = _nest(rest[1:], value)
    entries[int(index)] = _merge_member(old, new) if isinstance(old, dict) and isinstance(new, dict) else new
    return tree | {"rewards": entries}


def _parse_value(key: str, text: str) -> Any:
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]
    except YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise UserError(f"{key}: {text!r} is not valid yaml ({problem}); quote it twice: {key}='\"...\"'") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{key}: {_reason(error)}") from None
    if isinstance(value, (int, float)) and math.isfinite(value) and str(value) != text and text not in ("true", "false"):
        # to an option that is a text yaml's 1e3, 007, 1_000, no and 3:5 (three minutes and five seconds) mean what they say; to
        # one that is a number or a switch they mean the same, and are read when its type is known
        return text
    # yaml reads `thinking.end=####` as a comment and `chat.suffix=` as null
    return text if value is None and text.strip() not in ("null", "Null", "NULL", "~") else value


def _reason(error: OmegaConfBaseException) -> str:
    if isinstance(error, GrammarParseError):
        return "'${' begins an interpolation, which is not supported; write the value itself"
    return str(error).splitlines()[0]


def _nest(keys: Sequence[str], value: Any) -> Any:
    for key in reversed(keys):
        value = {key: value}
    return value


# ---- merging --------------------------------------------------------------------------------------------------------


def _merge(base: Tree, over: Tree) -> Tree:
    out = dict(base)
    for key, value in over.items():
        old = base.get(key)
        out[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out


def _merge_member(base: Tree, over: Tree) -> Tree:
    is_other = "name" in over and over["name"] != base.get("name")
    return dict(over) if is_other else _merge(base, over)
