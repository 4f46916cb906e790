"""Refusals in one form: the setting as a user wrote it, its value, and what was expected."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

type Check = Callable[[bool, str, str], None]
"""(condition, name of an attribute, expectation): raises ValueError unless the condition holds."""


def check_setting(ok: bool, name: str, value: Any, expected: str) -> None:
    """Refuse a setting unless a condition holds.

    Args:
      ok: the condition.
      name: of the setting, with its section.
      value: what it is.
      expected: what it must be.

    Raises:
      ValueError: with all three.
    """
    if not ok:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def make_check(section: str, settings: Any) -> Check:
    """Return the check of the attributes of one section.

    Args:
      section: name that goes before that of an attribute.
      settings: object whose attributes are the settings.

    Example:
      >>> import types
      >>> make_check("recipe.fst", types.SimpleNamespace(decay=-1))(False, "decay", "positive")
      Traceback (most recent call last):
      ValueError: recipe.fst.decay must be positive, got -1
    """

    def check(ok: bool, name: str, expected: str) -> None:
        check_setting(ok, f"{section}.{name}", getattr(settings, name), expected)

    return check


def check_used(section: str, settings: Any, users: Mapping[str, tuple[str, Sequence[Any]]]) -> None:
    """Refuse settings that another setting leaves without effect, unless they have their default.

    Args:
      section: name that goes before that of an attribute.
      settings: dataclass whose fields are the settings.
      users: setting -> (the other setting, those of its values with which it has an effect).

    Raises:
      ValueError: with both settings.

    Example:
      >>> @dataclasses.dataclass
      ... class Pattern:
      ...     kind: str = "window"
      ...     width: int = 3
      >>> check_used("pattern", Pattern("dense", 5), {"width": ("kind", ("window",))})
      Traceback (most recent call last):
      ValueError: pattern.width must be 3 with kind='dense', which has no use for it, got 5
    """
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    for name, (other, values) in users.items():
        choice, value, default = getattr(settings, other), getattr(settings, name), defaults[name]
        expected = f"{default!r} with {other}={choice!r}, which has no use for it"
        check_setting(choice in values or value == default, f"{section}.{name}", value, expected)


@contextlib.contextmanager
def prefix_errors(prefix: str) -> Iterator[None]:
    """Put a prefix before the message of every ValueError that is raised within.

    Args:
      prefix: such as "recipe.mst".

    Raises:
      ValueError: as the body does.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{prefix}: {error}") from error
