"""Refusals of a recipe's settings that name the setting as a user wrote it."""

import contextlib
from collections.abc import Callable
from typing import Any

type Check = Callable[[bool, str, str], None]
"""(condition, name of a setting, what was expected): raises ValueError unless it holds."""


def make_check(recipe_name: str, settings: Any) -> Check:
    """Return the check of a recipe's settings.

    Args:
      recipe_name: str, its section.
      settings: object whose attributes are the settings.

    Returns:
      Check.

    Example:
      >>> import types
      >>> make_check("fst", types.SimpleNamespace(decay=-1))(False, "decay", "positive")
      Traceback (most recent call last):
      ValueError: recipe.fst.decay must be positive, got -1
    """

    def check(ok: bool, name: str, expected: str) -> None:
        if not ok:
            value = getattr(settings, name)
            raise ValueError(f"recipe.{recipe_name}.{name} must be {expected}, got {value!r}")

    return check


def check_attention_sizes(check: Check, settings: Any) -> None:
    """Refuse sizes that are not positive, and blocks that do not fill a sequence.

    Args:
      check: of the recipe.
      settings: object with num_layers, length, block_size and probe_every_steps.

    Raises:
      ValueError: with the setting's name.
    """
    for name in ("num_layers", "length", "block_size", "probe_every_steps"):
        check(getattr(settings, name) > 0, name, "positive")
    fits = settings.length % settings.block_size == 0
    check(fits, "block_size", f"a divisor of the sequence length {settings.length}")


def share_of_steps(name: str, fraction: float, num_steps: int) -> int:
    """Return a share of a run in steps.

    Args:
      name: str, what the message calls the share.
      fraction: float in (0, 1].
      num_steps: int, steps of the run.

    Returns:
      int.

    Raises:
      ValueError: if the fraction is out of range.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {name}={fraction}")
    return round(fraction * num_steps)


@contextlib.contextmanager
def named_settings(section: str):
    """Put a section's name before the message of whatever is refused within.

    Args:
      section: str, such as "recipe.mst".

    Yields:
      None.

    Raises:
      ValueError: as the body does, with the name in front.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{section}: {error}") from error
