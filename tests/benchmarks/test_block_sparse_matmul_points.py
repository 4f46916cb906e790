"""What a point of the benchmark of block-sparse products compares, and what its targets say."""

import dataclasses
import json

import jax
import pytest

from benchmarks.block_sparse_matmul import (
    COLUMNS,
    TARGETS,
    Problem,
    headline_problems,
    make_case,
    make_inputs,
    sweep_problems,
)
from benchmarks.harness import RESULTS, measure_case
from benchmarks.records import make_table
from benchmarks.targets import evaluate

SMALL = Problem(
    measure="train", rows=64, inner=64, columns=96, block=16, density=0.25, dtype="float32"
)


def make_record(problem, name, ratio):
    values = {
        n: {"median_seconds": s, "tflops_per_second": 1.0} for n, s in ((name, 1), ("dense", ratio))
    }
    facts = {"device": "a GPU", "jax": "1", "python": "3", "date": "2026-01-02 03:04"}
    return {"key": {**problem.key(), "device": "a GPU"}, "values": values, "environment": facts}


def test_recorded_cpu_points_are_those_of_the_benchmark():
    recorded = json.loads((RESULTS / "block_sparse_matmul.json").read_text())["points"]
    keys = [{n: v for n, v in r["key"].items() if n != "device"} for r in recorded]
    assert all(problem.key() in keys for problem in headline_problems("cpu"))
    assert all("failed" not in value for r in recorded for value in r["values"].values())


def test_points_are_all_different_and_headlines_come_first():
    headline, sweep = headline_problems("gpu"), sweep_problems("gpu")
    assert sweep[: len(headline)] == headline
    assert len({json.dumps(p.key()) for p in sweep}) == len(sweep)
    assert all(side % p.block == 0 for p in sweep for side in (p.inner, p.columns))


@pytest.mark.ci
@pytest.mark.parametrize("measure", ["forward", "train"])
def test_both_functions_agree_with_their_references(measure):
    problem = dataclasses.replace(SMALL, measure=measure, dtype="bfloat16")
    case = make_case(problem, device=jax.devices("cpu")[0])
    values = measure_case(case, repeats=3, sample_seconds=0.0)
    assert set(values) == {"xla", "dense"}
    assert all("median_seconds" in value for value in values.values()), values
    # Six of 24 blocks.
    assert case.flops["dense"] == 4 * case.flops["xla"] and make_inputs(problem, 0).mask.sum() == 6


@pytest.mark.ci
def test_the_hopper_kernel_is_measured_on_hopper_only():
    class Device:
        platform, compute_capability = "gpu", "9.0"

    assert set(make_case(SMALL, device=Device()).functions) == {"mosaic_sm90", "dense"}
    Device.compute_capability = "8.0"
    case = make_case(SMALL, device=Device())
    assert set(case.functions) == {"xla", "dense"} and "found 8.0" in case.absent["mosaic_sm90"]
    assert "needs an NVIDIA GPU" in case.absent["triton"]
    # As many sets as fill the cache, at most.
    assert 1 + len(case.more_args) == 24


@pytest.mark.parametrize(
    ("name", "ratio", "outcomes"),
    [
        ("mosaic_sm90", 4.1, ["met", "not measured"]),
        ("mosaic_sm90", 3.9, ["missed", "not measured"]),
        ("xla", 1.9, ["not measured", "missed"]),
    ],
)
def test_targets_are_held_against_dense(name, ratio, outcomes):
    problem = headline_problems("gpu" if name == "mosaic_sm90" else "cpu")[0]
    records = [make_record(problem, name, ratio)]
    lines = evaluate(TARGETS, records).splitlines()
    assert [line.split(":")[0] for line in lines] == outcomes
    assert f"{ratio:.2f}x" in make_table(records, COLUMNS)
    other = make_record(dataclasses.replace(problem, density=0.2), name, 9.0)
    assert evaluate(TARGETS, [*records, other]).splitlines() == lines
