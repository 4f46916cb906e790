"""Nested mappings as users edit them: checked against dataclasses, compared, refused by name."""

import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any


class ConfigError(ValueError):
    """A setting that a user has to change: the message names key, value and expectation."""


def build_settings(cls, mapping: Mapping[str, Any], section: str, **known):
    """Build a dataclass from a mapping that has exactly its fields.

    Args:
      cls: dataclass, whose annotations say what a value must be.
      mapping: field name -> value.
      section: str, of the settings, for messages.
      **known: fields that do not come from the mapping.

    Returns:
      cls.

    Raises:
      ConfigError: on an unknown or missing key, or a wrong type.
    """
    hints = {name: hint for name, hint in typing.get_type_hints(cls).items() if name not in known}
    check_keys(mapping, tuple(hints), f"{section}.")
    values = {
        name: cast_value(mapping[name], hint, f"{section}.{name}") for name, hint in hints.items()
    }
    return cls(**values, **known)


def check_keys(mapping: Mapping[str, Any], expected: tuple[str, ...], prefix: str):
    """Refuse a mapping with other keys than expected.

    Args:
      mapping: what a user wrote.
      expected: all keys.
      prefix: str, put before a key in messages.

    Raises:
      ConfigError: with the key, and the one that was probably meant.
    """
    for key in mapping:
        if key not in expected:
            near = difflib.get_close_matches(key, expected, 1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known: {list(expected)}"
            raise ConfigError(f"unknown key {prefix}{key}{hint}")
    for key in expected:
        if key not in mapping:
            raise ConfigError(f"missing key {prefix}{key}")


def cast_value(value: Any, hint: Any, name: str) -> Any:
    """Return a value as what it must be; only an int becomes a float.

    Args:
      value: what a user wrote.
      hint: type, union with None, or Literal.
      name: str, of the setting.

    Returns:
      The value.

    Raises:
      ConfigError: if it is something else.
    """
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None:
            return None
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if isinstance(hint, typing.TypeAliasType):
        hint = hint.__value__
    if typing.get_origin(hint) is typing.Literal:
        check_setting(
            value in typing.get_args(hint), name, value, f"one of {typing.get_args(hint)}"
        )
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{name} must be of type {hint.__name__}, got {value!r}")
    return value


def check_setting(ok: bool, name: str, value: Any, expected: str):
    """Raise unless a setting is as expected.

    Args:
      ok: bool.
      name: str, of the setting.
      value: what it is.
      expected: str, what it must be.

    Raises:
      ConfigError: with all three.
    """
    if not ok:
        raise ConfigError(f"{name} must be {expected}, got {value!r}")


def find_differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the settings in which two nested mappings differ.

    Args:
      old: nested mapping.
      new: nested mapping.
      prefix: str, put before each key.

    Returns:
      list of str like "optimizer.learning_rate: 0.001 -> 0.002", sorted by key.

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
