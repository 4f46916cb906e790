"""Targets, break-even rows and tables are those of the records they are made from."""

import pytest

from benchmarks.harness import RESULTS
from benchmarks.nm_matmul_problems import Problem
from benchmarks.nm_matmul_report import (
    COLUMNS,
    evaluate_targets,
    packing_floor_seconds,
)
from benchmarks.nm_matmul_torch import CUSPARSELT
from benchmarks.records import Results, make_table

H200 = "NVIDIA H200"


def make_record(problem, seconds, device=H200, capability="9.0"):
    values = {
        name: {"median_seconds": s, "tflops_per_second": 1 / s, "temp_bytes": 0}
        for name, s in seconds.items()
    }
    facts = {"device": device, "jax": "1", "python": "3", "date": "2026-01-02 03:04"}
    if capability is not None:
        facts["compute_capability"] = capability
    key = {**problem.key(), "device": device}
    return {"key": key, "values": values, "environment": facts}


def cube(size, seconds, *, capability="9.0", **options):
    problem = Problem(
        **{"measure": "gemm", "rows": size, "inner": size, "columns": size, **options}
    )
    return make_record(problem, seconds, capability=capability)


def outcomes(records):
    return [line.split(":")[0] for line in evaluate_targets(records).splitlines()]


def test_without_records_nothing_is_measured():
    assert outcomes([]) == ["not measured"] * 5


@pytest.mark.parametrize("ratio, outcome", [(1.51, "met"), (1.49, "missed")])
def test_products_are_held_against_cublas_from_4096_on(ratio, outcome):
    seconds = {"mosaic_sm90": 1.0, "dense": ratio}
    assert outcomes([cube(4096, seconds)]) == [outcome] + ["not measured"] * 4
    for other in (cube(2048, seconds), cube(4096, seconds, measure="dx")):
        assert outcomes([other])[0] == "not measured"
    assert outcomes([cube(8192, {"mosaic_sm90": 1.0, "dense": 9.0}), cube(4096, seconds)])[0] == (
        outcome
    )


@pytest.mark.parametrize("ratio, outcome", [(1.0, "met"), (0.99, "missed")])
def test_products_are_held_against_cusparselt(ratio, outcome):
    record = cube(8192, {"mosaic_sm90": 1.0, CUSPARSELT: ratio})
    assert outcomes([record]) == ["not measured", outcome, *["not measured"] * 3]


@pytest.mark.parametrize("seconds, outcome", [(24e-6, "met"), (26e-6, "missed")])
def test_packing_is_held_against_25_microseconds(seconds, outcome):
    record = cube(4096, {"mosaic_sm90": seconds}, measure="pack", rows=1)
    assert outcomes([record])[2] == outcome
    assert packing_floor_seconds(record) == pytest.approx(18.35e-6, rel=1e-3)
    assert "| 3.67e+03 |" in make_table([record], COLUMNS) or seconds != 24e-6
    on_cpu = make_record(Problem(measure="pack", rows=1, inner=64, columns=64), {}, "a CPU")
    assert packing_floor_seconds(on_cpu) is None


@pytest.mark.parametrize("ratio, outcome", [(1.31, "met"), (1.29, "missed")])
def test_blocks_are_held_against_dense_from_width_2048_on(ratio, outcome):
    def block(width, **options):
        options = {"grad_pruning": "mvue", "activation": "gelu", **options}
        problem = Problem(measure="ffn", rows=16384, inner=width, columns=4 * width, **options)
        return make_record(problem, {"mosaic_sm90": 1.0, "dense": ratio})

    assert outcomes([block(2048)])[3] == outcome
    assert outcomes([block(1600)])[3] == "not measured"
    assert outcomes([block(2048, grad_pruning="none")])[3] == "not measured"


@pytest.mark.parametrize(
    ("capability", "ratio", "outcome"),
    [
        ("8.0", 1.31, "met"),
        ("8.9", 1.29, "missed"),
        ("9.0", 1.29, "missed"),
        ("10.0", 1.29, "not measured"),
        ("12.0", 1.31, "not measured"),
        # As records were before they named it.
        (None, 1.31, "not measured"),
    ],
)
def test_triton_is_held_against_its_own_dense_kernel(capability, ratio, outcome):
    seconds = {"triton": 1.0, "dense_triton": ratio}
    record = cube(4096, seconds, capability=capability)
    assert outcomes([record]) == ["not measured"] * 4 + [outcome]
    assert outcomes([cube(2048, seconds, capability=capability)])[4] == "not measured"
    assert f"| {ratio:.2f}x |" in make_table([record], COLUMNS)


def test_recorded_points_make_the_table_that_is_there():
    table = make_table(Results(RESULTS / "nm_matmul.json").records, COLUMNS)
    assert table == (RESULTS / "nm_matmul.md").read_text()
