"""The settings of a model as another library wrote them, read one by one."""

from collections.abc import Mapping
from typing import Any

from sparsejax.checks import check_setting

_NEEDED = object()


class Settings:
    """Settings of a model in the names of `transformers`; what is read is checked.

    Attributes:
      origin: the file that they come from, for messages.
    """

    def __init__(self, values: Mapping[str, Any], origin: str):
        """Wrap them.

        Args:
          values: those of config.json.
          origin: the file that they come from.
        """
        self._values, self.origin = values, origin

    def check(self, ok: bool, name: str, expected: str) -> None:
        """Refuse a setting unless a condition holds.

        Raises:
          ValueError: with setting, file, value and expectation.
        """
        check_setting(ok, f"{self.origin}: {name}", self._values.get(name), expected)

    def get_int(self, name: str, default: Any = _NEEDED) -> int:
        """Return a setting that is a positive integer, or, absent or null, the default.

        Raises:
          ValueError: if it is another value, or absent without default.
        """
        value = self._get(name, default)
        self.check(type(value) is int and value > 0, name, "a positive integer")
        return value

    def get_float(self, name: str, default: Any = _NEEDED) -> float:
        """Return a setting that is a positive number, or, absent or null, the default.

        Raises:
          ValueError: if it is another value, or absent without default.
        """
        value = self._get(name, default)
        self.check(type(value) in (int, float) and value > 0, name, "a positive number")
        return float(value)

    def get_choice(self, name: str, choices: tuple, default: Any = _NEEDED) -> Any:
        """Return a setting that is one of some values, or, absent, the default.

        Raises:
          ValueError: if it is another value, or absent without default.
        """
        value = self._values.get(name, default)
        listed = repr(choices[0]) if len(choices) == 1 else f"one of {choices}"
        ok = any(type(value) is type(choice) and value == choice for choice in choices)
        self.check(ok, name, listed)
        return value

    def get_section(self, name: str) -> "Settings | None":
        """Return settings within these, None where there are none.

        Raises:
          ValueError: if the value is another.
        """
        value = self._values.get(name)
        self.check(value is None or isinstance(value, dict), name, "an object or null")
        return None if value is None else Settings(value, f"{self.origin}: {name}")

    def has(self, name: str) -> bool:
        """Return whether a setting is there."""
        return name in self._values

    def check_names(self, names: set[str]) -> None:
        """Refuse settings of other names.

        Raises:
          ValueError: with the first.
        """
        for name in self._values:
            if name not in names:
                raise ValueError(
                    f"{self.origin} must have no settings but {sorted(names)}, got {name!r}"
                )

    def _get(self, name: str, default: Any) -> Any:
        value: Any = self._values.get(name)
        return value if value is not None or default is _NEEDED else default
