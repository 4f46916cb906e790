"""The committed predictions: of all kernels as they are now, and near what is published."""

import json

import pytest

from benchmarks.cycle_cases import list_anchors, list_cases, read_loops
from benchmarks.hopper_cycles import PATH, describe_counts
from pallas_kernels import aot
from tests.tiers import tier

_COMMAND = "PYTHONPATH=.venv/compile JAX_PLATFORMS=cpu python -m benchmarks.hopper_cycles"
_CASES = {case.name: case for case in list_cases()}
_SAMPLE = "attention, H=128, blocks of 128"


def _read_records():
    return {tuple(x["key"].values()): x for x in json.loads(PATH.read_text())["points"]}


def test_every_kernel_has_a_prediction():
    cases = [*list_anchors(), *_CASES.values()]
    names = {(case.name, kernel.label) for case in cases for kernel in case.kernels}
    assert names == {key for key in _read_records() if key[1] != "together"}, _COMMAND


def test_published_rates_are_met_within_15_percent():
    errors = {
        key: x["values"]["error"] for key, x in _read_records().items() if "error" in x["values"]
    }
    assert len(errors) == len(list(list_anchors()))
    assert all(abs(error) < 0.15 for error in errors.values()), errors


@pytest.mark.parametrize(
    "case", tier(_CASES, fast=(), slow=[name for name in _CASES if name != _SAMPLE])
)
def test_the_main_loop_is_the_one_of_the_prediction(case):
    records = _read_records()
    for kernel, loop in zip(case.kernels, read_loops(case, aot.H200), strict=True):
        recorded = records[case.name, kernel.label]["values"]["counts"]
        assert recorded == describe_counts(loop), f"the kernel has changed: {_COMMAND}"
