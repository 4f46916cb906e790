"""The committed rates of a CPU are those of the benchmarks as they are, and all were right."""

import dataclasses
import json

import pytest

from benchmarks import attention_tiles, block_products_cpu, nm_cpu
from benchmarks.harness import RESULTS

_KEYS = {
    "attention_tiles": [dataclasses.asdict(p) for p in attention_tiles.list_problems()],
    "block_products_cpu": [dataclasses.asdict(p) for p in block_products_cpu.list_problems()],
    "nm_cpu": nm_cpu.list_keys(),
}


@pytest.mark.parametrize("name", _KEYS)
def test_every_point_is_recorded_and_right(name):
    points = json.loads((RESULTS / f"{name}.json").read_text())["points"]
    keys = [{n: value for n, value in p["key"].items() if n != "device"} for p in points]
    assert all(key in keys for key in _KEYS[name])
    assert all("failed" not in value for p in points for value in p["values"].values())
