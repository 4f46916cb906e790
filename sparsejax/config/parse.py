"""From nested mappings, as users edit them, to frozen settings: checked, listed, compared."""

import contextlib
import copy
import dataclasses
import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sparsejax.config.schema import (
    RecipeSettings,
    TrainConfig,
    list_sparse_weights,
    make_recipe,
    make_transformer_config,
)
from sparsejax.data import DataConfig
from sparsejax.patterns import WeightBlocks
from sparsejax.recipes.own import is_own
from sparsejax.recipes.registry import RECIPES, RecipeEntry

_SECTIONS = ("model", "data", "optimizer", "recipe", "checkpoint", "mesh")
_OWN = "own"
_FLOAT32_LIMIT = float(2**128)


class ConfigError(ValueError):
    """A setting that a user has to change: the message names key, value and expectation."""


@contextlib.contextmanager
def naming_data() -> Iterator[None]:
    """Turn what the data layer refuses, which names its own fields or files, into a ConfigError.

    Raises:
      ConfigError: if the body raises ValueError, with "data." before a field, "data: " before
        anything else.
    """
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        begins_with_field = re.match(r"\w+=", str(error))
        raise ConfigError(f"data{'.' if begins_with_field else ': '}{error}") from error


class Setting(NamedTuple):
    """One key that settings may have.

    Attributes:
      name: with its sections, such as "optimizer.learning_rate".
      type: of its values; if it may be None, the type of the others.
      optional: it may be None.
      default: its value if nothing else is said.
      meaning: what it does, with its unit.
    """

    name: str
    type: type
    optional: bool
    default: Any
    meaning: str


def list_settings() -> Iterator[Setting]:
    """List every key, with the defaults of the dataclasses and the meanings that they document.

    Yields:
      Setting, those of a section one after the other.
    """
    names = {field.name for field in dataclasses.fields(TrainConfig)} - {*_SECTIONS}
    yield from _list_section(TrainConfig, "", names)
    default = TrainConfig()
    for section in _SECTIONS:
        if section != "recipe":
            cls = type(getattr(default, section))
            names = {field.name for field in dataclasses.fields(cls)} - {"seed"}
            yield from _list_section(cls, f"{section}.", names)
    known = ", ".join(RECIPES)
    meaning = (
        f'which method trains: {known}; "module:function", which makes one of your own; or two '
        'joined by "+", such as "spion+fst"'
    )
    yield Setting("recipe.name", str, False, default.recipe.name, meaning)
    meaning = "which weights a method of your own prunes, as in the other sections"
    yield Setting("recipe.own.sparse_weights", str, False, "", meaning)
    for entry in RECIPES.values():
        prefix = f"recipe.{entry.name}."
        if entry.sparse_weights is not None:
            meaning = (
                'which weights are sparse, ordered "regex=pattern; regex=pattern" over '
                "attention/qkv, attention/out, mlp/up, mlp/down, embedding, and of an "
                "encoder-decoder decoder/mlp/up, decoder/mlp/down"
            )
            yield Setting(f"{prefix}sparse_weights", str, False, entry.sparse_weights, meaning)
        yield from _list_section(entry.config_class, prefix, set(entry.setting_names))


def parse_config(mapping: Mapping[str, Any]) -> TrainConfig:
    """Check a nested mapping and freeze it.

    Everything that can be known before the data is read is checked here.

    Args:
      mapping: nested dict (or ConfigDict) with exactly the keys of `list_settings`. Of recipes, the
        section of the chosen one is enough, and the only one that is looked at.

    Raises:
      ConfigError: on an unknown or missing key, a wrong type or a value out of range; the message
        names key, value and expectation.
    """
    try:
        hints = typing.get_type_hints(TrainConfig)
        _check_keys(mapping, tuple(hints), "")
        values = {
            name: _cast(mapping[name], hint, name)
            for name, hint in hints.items()
            if name not in _SECTIONS
        }
        for section in ("model", "optimizer", "checkpoint", "mesh"):
            values[section] = _build(hints[section], mapping[section], f"{section}.")
        with naming_data():
            values["data"] = _build(DataConfig, mapping["data"], "data.", seed=values["seed"])
        values["recipe"] = _read_recipe(mapping["recipe"])
        config = TrainConfig(**values)
        _refuse_early(config)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return config


def add_later_settings(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Give a recorded run the settings that its version did not have yet.

    They have their defaults. Top-level settings are not completed.

    Args:
      recorded: nested dict, with the sections that the run used.

    Returns:
      nested dict with all keys of these sections.

    Example:
      >>> add_later_settings({"checkpoint": {"keep_last": 3}})
      {'checkpoint': {'keep_last': 3, 'every_steps': 100, 'keep_best': 1}}
    """
    completed = copy.deepcopy({**recorded})
    for setting in list_settings():
        *sections, name = setting.name.split(".")
        section: Any = completed
        for part in sections:
            section = section.get(part) if isinstance(section, dict) else None
        if sections and isinstance(section, dict):
            section.setdefault(name, setting.default)
    return completed


def describe_unused(mapping: Mapping[str, Any]) -> str:
    """Tell what a mapping sets of recipes other than its own.

    A config file may hold the settings of several, so that one flag compares them.

    Args:
      mapping: nested mapping that `parse_config` takes.

    Returns:
      One line, or "" if it sets nothing of others.
    """
    recipe = mapping["recipe"]
    used = {_OWN if is_own(method) else method for method in recipe["name"].split("+")}
    defaults = {setting.name: setting.default for setting in list_settings()}
    unused = []
    for section in sorted({*recipe} - {"name"} - used):
        changed = sorted(
            name
            for name, value in recipe[section].items()
            if value != defaults[f"recipe.{section}.{name}"]
        )
        if changed:
            unused.append(f"{section} ({', '.join(changed)})")
    if not unused:
        return ""
    return f"note: recipe {recipe['name']!r} has no use for what is set of {', '.join(unused)}"


def find_differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the settings in which two nested mappings differ.

    Args:
      old: nested mapping.
      new: nested mapping.
      prefix: put before each key.

    Returns:
      Lines like "optimizer.learning_rate: 0.001 -> 0.002", sorted by key.

    Example:
      >>> find_differences({"a": {"b": 1}}, {"a": {"b": 2}})
      ['a.b: 1 -> 2']
    """
    lines = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += find_differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return lines


def _list_section(cls: type, prefix: str, names: set[str]) -> Iterator[Setting]:
    hints, meanings = typing.get_type_hints(cls), _read_meanings(cls)
    for field in dataclasses.fields(cls):
        if field.name in names:
            hint, optional = _split_hint(hints[field.name])
            kind = type(typing.get_args(hint)[0]) if _is_literal(hint) else hint
            meaning = meanings.get(field.name, "")
            yield Setting(f"{prefix}{field.name}", kind, optional, field.default, meaning)


def _read_meanings(cls: type) -> dict[str, str]:
    """Return what the docstrings of a dataclass and of its bases say of its attributes."""
    meanings = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(base.__doc__ or "")
        section = re.search(r"^(?:Attributes|Args):\n((?:[ ]+.*\n|\n)*)", text + "\n", re.MULTILINE)
        if section:
            entries = inspect.cleandoc("\n" + section[1])
            for name, meaning in re.findall(r"^(\w+): (.*(?:\n(?: .*|$))*)", entries, re.MULTILINE):
                meanings[name] = " ".join(meaning.split())
    return meanings


def _build(cls: type, mapping: Mapping[str, Any], prefix: str, **known: Any) -> Any:
    """Build a dataclass from a mapping that has exactly its fields, but for those known."""
    hints = {name: hint for name, hint in typing.get_type_hints(cls).items() if name not in known}
    return cls(**_cast_section(mapping, hints, prefix), **known)


def _read_recipe(mapping: Mapping[str, Any]) -> RecipeSettings:
    if "name" not in mapping:
        raise ConfigError("missing key recipe.name")
    known = {name: _get_hints(entry) for name, entry in RECIPES.items()}
    known = {name: hints for name, hints in known.items() if hints} | {
        _OWN: {"sparse_weights": str}
    }
    _check_keys({**dict.fromkeys(known), **mapping}, ("name", *known), "recipe.")
    for section in {*mapping} - {"name"}:
        if not isinstance(mapping[section], Mapping):
            raise ConfigError(f"recipe.{section} must be a mapping, got {mapping[section]!r:.60}")
        # One that is not used may lack keys, but has no others.
        names = tuple(known[section])
        _check_keys({**dict.fromkeys(names), **mapping[section]}, names, f"recipe.{section}.")
    name = _cast(mapping["name"], str, "recipe.name")
    chosen = {}
    for method in RecipeSettings(name=name).methods:
        section = _OWN if is_own(method) else method
        if section not in known:
            continue
        if section not in mapping:
            raise ConfigError(f"missing key recipe.{section}")
        chosen[section] = _cast_section(mapping[section], known[section], f"recipe.{section}.")
    return RecipeSettings(name=name, sections=chosen)


def _get_hints(entry: RecipeEntry) -> dict[str, Any]:
    hints = typing.get_type_hints(entry.config_class)
    chosen = {name: hints[name] for name in entry.setting_names}
    return chosen | ({} if entry.sparse_weights is None else {"sparse_weights": str})


def _refuse_early(config: TrainConfig) -> None:
    """Build model and recipe for data that is not read yet: what no data could make valid.

    What some task could make valid is not refused yet. The vocabulary has as many ids as blocks of
    an embedding can divide.
    """
    patches = bool(config.data.patch_size)
    tasks = {"classification": 2, "masked_language_model": 0, "language_model": 0}
    if config.data.kind == "pairs":
        tasks = {"translation": 0}
    blocks = [pattern for _, pattern in list_sparse_weights(config.recipe)]
    rows = [pattern.rows for pattern in blocks if isinstance(pattern, WeightBlocks)]
    vocab_size = 1 if config.model.vocab_size else math.lcm(*rows)
    refused = None
    for task, num_classes in tasks.items():
        try:
            model = make_transformer_config(
                config,
                task=task,
                vocab_size=0 if patches else vocab_size,
                num_classes=num_classes,
                patch_values=int(patches),
            )
            make_recipe(config, model)
            return
        except ValueError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _cast_section(
    mapping: Mapping[str, Any], hints: Mapping[str, Any], prefix: str
) -> dict[str, Any]:
    _check_keys(mapping, tuple(hints), prefix)
    return {name: _cast(mapping[name], hint, f"{prefix}{name}") for name, hint in hints.items()}


def _check_keys(mapping: Mapping[str, Any], expected: Sequence[str], prefix: str) -> None:
    for key in mapping:
        if key not in expected:
            near = difflib.get_close_matches(key, expected, 1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known: {list(expected)}"
            raise ConfigError(f"unknown key {prefix}{key}{hint}")
    for key in expected:
        if key not in mapping:
            raise ConfigError(f"missing key {prefix}{key}")


def _cast(value: Any, hint: Any, name: str) -> Any:
    """Return a value as what it must be; only an int becomes a float."""
    hint, optional = _split_hint(hint)
    if value is None and optional:
        return None
    if _is_literal(hint):
        known = typing.get_args(hint)
        if value not in known:
            raise ConfigError(f"{name} must be one of {known}, got {value!r}")
        return value
    is_bool = isinstance(value, bool)
    if not isinstance(value, (float, int) if hint is float else hint) or is_bool != (hint is bool):
        raise ConfigError(f"{name} must be of type {hint.__name__}, got {value!r}")
    return _check_size(value, hint, name)


def _check_size(value: Any, hint: Any, name: str) -> Any:
    """Return a number as its type, if devices have room for it; anything else as it is."""
    if hint is float:
        if not abs(value) < _FLOAT32_LIMIT:
            raise ConfigError(f"{name} must be a finite number of float32, got {value!r}")
        return float(value)
    limit = 2**32 if name == "seed" else 2**31
    if hint is int and not -limit <= value < limit:
        raise ConfigError(f"{name} must be below {limit} in size, got {value!r}")
    return value


def _split_hint(hint: Any) -> tuple[Any, bool]:
    """Return a type without None and without its alias, and whether None was among it."""
    optional = typing.get_origin(hint) in (types.UnionType, typing.Union)
    if optional:
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if isinstance(hint, typing.TypeAliasType):
        hint = hint.__value__
    return hint, optional


def _is_literal(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Literal
