"""Refusals of a recipe's settings that name the setting as a user wrote it."""

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
