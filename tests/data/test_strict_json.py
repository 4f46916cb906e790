"""Strict JSON: what is not is refused, by ValueError alone."""

import math

import pytest

from sparsejax.strict_json import dump_json, load_json

NOT_STRICT = {
    "nothing": "",
    "a word": "x",
    "two values": "1 2",
    "lists without end": "[" * 200_000,
    "lists that end": "[" * 200_000 + "]" * 200_000,
    "deeper than Python calls": "[" * 1_500 + "]" * 1_500,
    "objects without end": '{"a":' * 100_000,
    "not utf-8": b"\xff",
    "utf-16": "{}".encode("utf-16"),
    "a mark": b"\xef\xbb\xbf{}",
    "a key twice": '[{"a": {"b": 1, "b": 2}}]',
    "too many digits": "9" * 5_000,
    "too large for a float": "[1e999]",
    "not a number": "[NaN]",
    "infinity": '{"a": -Infinity}',
}


@pytest.mark.parametrize("case", NOT_STRICT)
def test_what_is_not_strict_is_refused_in_one_line(case):
    with pytest.raises(ValueError) as refused:
        load_json(NOT_STRICT[case])
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 200


def test_what_is_written_comes_back():
    value = {"a": [1, 2.5, None, True, math.inf, "NaN?"], "caf\udce9": {"": -0.0}}
    assert load_json(dump_json(value)) == load_json(dump_json(value).encode()) == value
