"""The configuration of a run as one tree of dataclasses: families resolved by name, every key and type checked.

    load_config("hrpo_gsm8k", "my_gpu.yaml", "optim.lr=1e-6", "data.train=train.jsonl")

OmegaConf's structured configs convert and check; what they refuse is told in one sentence that names the key.
Deviation from OmegaConf: `${...}` is refused, so that a configuration file never reads the environment.

The options themselves are in `fastlatent.schema`. `layers` reads recipes, files and words into a plain tree, `validation` says
what a configuration must be beyond its types, and `helptext` explains every option.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from fastlatent.config import option_names
from fastlatent.config.layers import Tree, family_defaults, is_override, merge_layer, read_layers
from fastlatent.config.validation import validate
from fastlatent.errors import UserError
from fastlatent.registry import Family, import_path
from fastlatent.schema import FAMILIES, Config

BASE_CONFIGS = {"method": "fastlatent.methods.base:MethodConfig", "engine": "fastlatent.rollout.base:EngineConfig",
                "data": "fastlatent.data.base:DataConfig", "rewards": "fastlatent.rewards.base:RewardConfig"}
"""What the Config of a member of each family is a subclass of."""


def load_config(*layers: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration that recipes (by name), yaml files (by path) and `key=value` words add up to, checked.

    Files and recipes merge left to right; overrides, wherever they stand among `layers`, come after all of them.

    Raises:
        UserError: unknown recipe, file, key, family member; malformed yaml; a value of the wrong type or out of range.
    """
    named = [layer for layer in layers if not is_override(layer)]
    words = [layer for layer in layers if is_override(layer)]
    return from_dict(read_layers(named, [*words, *overrides]))


def from_dict(tree: Tree) -> Config:
    """The checked configuration of a plain tree, as `to_dict` gives it; what is absent takes its default."""
    _check_values(tree, "")
    tree = merge_layer(family_defaults(), tree)
    config = _typed(Config, {key: value for key, value in tree.items() if key not in FAMILIES}, "")
    for key in ("method", "engine", "data"):
        setattr(config, key, _member(key, tree[key], key))
    if not isinstance(tree["rewards"], list):
        raise UserError(f"rewards: wanted a list of sections, got {tree['rewards']!r}")
    config.rewards = [_member("rewards", entry, f"rewards.{i}") for i, entry in enumerate(tree["rewards"])]
    validate(config)
    return config


def to_dict(config: Config) -> Tree:
    """The whole configuration as dictionaries, lists and scalars; `from_dict` gives an equal one back."""
    return _plain(dataclasses.asdict(config))


# ---- families -------------------------------------------------------------------------------------------------------


def family(key: str) -> Family:
    """The family that fills section `key`."""
    return import_path(FAMILIES[key], key)


def member_schema(key: str, name: str, where: str) -> type:
    """The Config dataclass of the member of section `key` called `name`; RewardConfig for a user's plain function."""
    member = family(key).find(name, where)
    base = import_path(BASE_CONFIGS[key], key)
    schema = getattr(member, "Config", base if key == "rewards" else None)
    if not callable(member) or not (isinstance(schema, type) and issubclass(schema, base)):
        wanted = "a function" if key == "rewards" else f"a class with a Config that is a {base.__name__}"
        raise UserError(f"{where}: wanted {wanted}, got {name!r}, which is none")
    return schema


def _member(key: str, section: Any, path: str):
    """The typed section of one family member."""
    if not isinstance(section, dict):
        raise UserError(f"{path}: wanted a section with a name, as in {path}.name=..., got {section!r}")
    name = section.get("name")
    if not isinstance(name, str):
        raise UserError(f"{path}.name: wanted one of {', '.join(family(key).names())}, got {name!r}")
    return _typed(member_schema(key, name, f"{path}.name"), section, path)


# ---- the typed merge ------------------------------------------------------------------------------------------------


def _typed(schema: type, tree: Tree, path: str):
    """An instance of the dataclass `schema` filled from `tree`; `path` is where it lies, for messages."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), tree))
    except MissingMandatoryValue as error:
        raise _no_value(_join(path, error.full_key)) from None
    except (OmegaConfBaseException, TypeError) as error:
        reason = UserError(f"{path or 'configuration'}: {str(error).splitlines()[0]}")
        raise _first_misfit(schema, tree, path) or reason from None


def _first_misfit(schema: type, tree: Tree, path: str) -> UserError | None:
    """The sentence about the first entry of `tree` that does not fit, found by merging one at a time."""
    node = OmegaConf.structured(schema)
    for keys, value in _leaves(tree):
        layer = value
        for key in reversed(keys):
            layer = {key: layer}
        try:
            OmegaConf.merge(node, layer)
        except (OmegaConfBaseException, TypeError):
            return _misfit(schema, layer, path)
    return None


def _misfit(hint: Any, value: Any, path: str) -> UserError:
    """Follow the only key of each level of `value` until it leaves the schema or meets a type it does not fit."""
    section = section_of(hint)
    if section is None or not isinstance(value, dict) or not value:
        return UserError(f"{path}: wanted {_describe(hint)}, got {'null' if value is None else repr(value)}")
    (key, below), = value.items()
    names = [f.name for f in dataclasses.fields(section)]
    if key not in names:
        return UserError(f"{_join(path, key)}: no such option; {option_names.hint(str(key), section)}")
    return _misfit(typing.get_type_hints(section)[key], below, _join(path, key))


def _leaves(tree: Tree, above: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


def section_of(hint: Any) -> type | None:
    """The dataclass that `hint` is, or is optionally."""
    return next((t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)), None)


def _describe(hint: Any) -> str:
    """A type as a user would say it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(arg) for arg in args)
    if origin is list:
        return f"a list, each entry {_describe(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)}: {', '.join(_describe(arg) for arg in args)}"
    if dataclasses.is_dataclass(hint):
        return "a section"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return names.get(hint, "a mapping" if origin is dict else str(hint))


def _check_values(value: Any, path: str) -> None:
    """Refuse `${...}`, and `???`, which a recipe writes where the user has to choose."""
    if isinstance(value, dict):
        for key, below in value.items():
            _check_values(below, _join(path, key))
    elif isinstance(value, list):
        for index, below in enumerate(value):
            _check_values(below, _join(path, index))
    elif value == MISSING:
        raise _no_value(path)
    elif isinstance(value, str) and "${" in value:
        raise UserError(f"{path}: '${{' begins an interpolation, which is not supported; write the value itself")


def _no_value(path: str) -> UserError:
    return UserError(f"{path}: no value given and there is no default; add {path}=...")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(below) for key, below in value.items()}
    return [_plain(below) for below in value] if isinstance(value, (list, tuple)) else value


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
