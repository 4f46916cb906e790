"""What a point of the benchmark of transposable masks compares, and what its target says."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from benchmarks.harness import measure_case
from benchmarks.records import make_table
from benchmarks.targets import evaluate
from benchmarks.transposable_mask import (
    COLUMNS,
    TARGETS,
    Problem,
    headline_problems,
    make_case,
    share_of_different_entries,
    sweep_problems,
)

SMALL = Problem(rows=64, columns=96, dtype="bfloat16")


def make_record(problem, seconds, device="NVIDIA H200"):
    values = {"triton": {"median_seconds": seconds}, "xla": {"median_seconds": 1e-3}}
    facts = {"device": device, "jax": "1", "python": "3", "date": "2026-01-02 03:04"}
    return {"key": {**problem.key(), "device": device}, "values": values, "environment": facts}


def test_points_are_all_different_and_headlines_come_first():
    headline, sweep = headline_problems("gpu"), sweep_problems("gpu")
    assert sweep[: len(headline)] == headline
    assert len({json.dumps(p.key()) for p in sweep}) == len(sweep)
    assert all(side % 4 == 0 for p in sweep for side in (p.rows, p.columns))


def test_without_a_gpu_xla_is_measured_and_the_kernel_says_why_not():
    case = make_case(SMALL)
    assert set(case.functions) == {"xla"} and len(case.args) == case.units == 1
    assert "needs an NVIDIA GPU, found 'cpu'" in case.absent["triton"]


@pytest.mark.ci
def test_what_is_measured_agrees_with_its_reference():
    values = measure_case(make_case(SMALL), repeats=3, sample_seconds=0.0)
    assert "median_seconds" in values["xla"] and "absent" in values["triton"], values


def test_masks_that_differ_are_noticed():
    mask = jnp.eye(4, dtype=bool)
    assert share_of_different_entries([mask, mask], [mask, mask]) == 0
    assert share_of_different_entries([mask, mask], [mask, mask.at[0, 1].set(True)]) == 1 / 16


def test_a_call_on_a_gpu_searches_more_than_its_cache_holds():
    assert headline_problems("gpu")[0].count_weights() == 8
    small = Problem(rows=768, columns=3072, dtype="bfloat16")
    assert small.count_weights() * small.moved_bytes >= 128e6


@pytest.mark.parametrize(("seconds", "outcome"), [(99e-6, "met"), (101e-6, "missed")])
def test_the_target_is_held_against_the_time_of_the_kernel(seconds, outcome):
    problem = headline_problems("gpu")[0]
    records = [make_record(problem, seconds)]
    assert evaluate(TARGETS, records).startswith(f"{outcome}: ")
    rate = 4096 * 4096 * 3 / seconds / 1e12
    assert f"{rate:.3g}" in make_table(records, COLUMNS)
    others = [
        make_record(problem, 1.0, device="NVIDIA A100"),
        make_record(dataclasses.replace(problem, dtype="float32"), 1.0),
    ]
    assert evaluate(TARGETS, others).startswith("not measured: ")
