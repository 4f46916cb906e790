"""JSON that comes back as it was: no NaN, no infinities, all digits of a float."""

import json
import math
from typing import Any

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def dump_json(value: Any, name: str = "value") -> str:
    """Write a value as one line of strict JSON that `load_json` turns back into the same value.

    JSON has no NaN and no infinities: they become the strings "NaN", "Infinity" and
    "-Infinity", which those words alone may therefore not be. Floats keep all their digits.

    Args:
      value: None, bool, int, float, str, or lists and string-keyed dicts of them.
      name: str, what an error message calls the value.

    Returns:
      str without line breaks.

    Raises:
      ValueError: if some part of the value would not come back as it was.

    Example:
      >>> dump_json({"loss": float("nan"), "step": 3})
      '{"loss": "NaN", "step": 3}'
      >>> load_json('{"loss": "-Infinity", "step": 3}')
      {'loss': -inf, 'step': 3}
    """
    return json.dumps(_encode(value, name), allow_nan=False)


def load_json(text: str | bytes) -> Any:
    """Read what `dump_json` wrote.

    Args:
      text: str or bytes, one JSON value.

    Returns:
      The value, with non-finite floats as floats.

    Raises:
      ValueError: it is not one value of strict JSON in UTF-8, an object names a key twice, a number
        is too large for a float, or lists and objects are nested too deeply.

    Example:
      >>> load_json('{"step": 3, "step": 4}')
      Traceback (most recent call last):
      ValueError: the key 'step' must stand once in an object, got it twice
    """
    if isinstance(text, bytes):
        # `json.loads` would guess UTF-16 and UTF-32.
        text = text.decode()
    try:
        return _decode(json.loads(text, object_pairs_hook=_make_object))
    except RecursionError as error:
        raise ValueError("JSON must not be nested that deeply") from error


def _encode(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"the keys of {name} must be strings, got {key!r}")
        return {key: _encode(item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list):
        return [_encode(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, str) and value in _NON_FINITE:
        raise ValueError(f"{name} must not be the string {value!r}: it stands for the float")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"{name} must be None, bool, int, float, str, list or dict, got {value!r} "
        f"of type {type(value).__name__}"
    )


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in value if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} must stand once in an object, got it twice")
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"a number of JSON must be finite, got {value}")
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
