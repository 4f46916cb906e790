"""Targets, break-even rows and tables are those of the records they are made from."""

import pytest

from benchmarks.nm_matmul_problems import Problem
from benchmarks.nm_matmul_report import (
    COLUMNS,
    describe_break_even,
    evaluate_targets,
    list_break_even,
    packing_floor_seconds,
)
from benchmarks.nm_matmul_tiles import COLUMNS as TILE_COLUMNS
from benchmarks.nm_matmul_tiles import DEFAULT, Product, describe_tuned
from benchmarks.nm_matmul_torch import CUSPARSELT
from benchmarks.records import make_table
from pallas_kernels.nm_matmul.mosaic_sm90.break_even import Measurement, beats_dense
from pallas_kernels.nm_matmul.mosaic_sm90.kernel import Tiles

H200 = "NVIDIA H200"


def make_record(problem, seconds, device=H200):
    values = {
        name: {"median_seconds": s, "tflops_per_second": 1 / s, "temp_bytes": 0}
        for name, s in seconds.items()
    }
    facts = {"device": device, "jax": "1", "python": "3", "date": "2026-01-02 03:04"}
    key = {**problem.key(), "device": device}
    return {"key": key, "values": values, "environment": facts}


def cube(size, seconds, **options):
    problem = Problem(
        **{"measure": "gemm", "rows": size, "inner": size, "columns": size, **options}
    )
    return make_record(problem, seconds)


def outcomes(records):
    return [line.split(":")[0] for line in evaluate_targets(records).splitlines()]


def test_without_records_nothing_is_measured():
    assert outcomes([]) == ["not measured"] * 4


@pytest.mark.parametrize("ratio, outcome", [(1.51, "met"), (1.49, "missed")])
def test_products_are_held_against_cublas_from_4096_on(ratio, outcome):
    seconds = {"mosaic_sm90": 1.0, "dense": ratio}
    assert outcomes([cube(4096, seconds)]) == [outcome] + ["not measured"] * 3
    for other in (cube(2048, seconds), cube(4096, seconds, measure="dx")):
        assert outcomes([other])[0] == "not measured"
    assert outcomes([cube(8192, {"mosaic_sm90": 1.0, "dense": 9.0}), cube(4096, seconds)])[0] == (
        outcome
    )


@pytest.mark.parametrize("ratio, outcome", [(1.0, "met"), (0.99, "missed")])
def test_products_are_held_against_cusparselt(ratio, outcome):
    record = cube(8192, {"mosaic_sm90": 1.0, CUSPARSELT: ratio})
    assert outcomes([record]) == ["not measured", outcome, "not measured", "not measured"]


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


def test_break_even_rows_are_those_the_dispatcher_reads():
    records = [
        cube(4096, {"mosaic_sm90": 1.0, "dense": 1.6}),
        cube(1024, {"mosaic_sm90": 1.0, "dense": 0.8}),
        cube(4096, {"mosaic_sm90": 1.0, "dense": 1.6}, measure="dx"),
        cube(2048, {"dense": 1.0}),
    ]
    rows = list_break_even(records, H200)
    assert rows == [
        Measurement(1024, 1024, 1024, "bfloat16", 1.25),
        Measurement(4096, 4096, 4096, "bfloat16", 0.625),
    ]
    assert beats_dense(4096, 4096, 4096, "bfloat16", measured=rows)
    text = describe_break_even(records)
    assert "at 1 of 2 shapes" in text
    assert text.count('Measurement(1024, 1024, 1024, "bfloat16", 1.25),') == 1
    assert list_break_even(records, "NVIDIA H100") == [] and describe_break_even([]) == ""


def test_the_table_leaves_out_what_was_not_measured():
    table = make_table([cube(512, {"xla": 2.0, "dense": 1.0})], COLUMNS)
    assert "Hopper" not in table and "cuSPARSELt" not in table
    assert "| 0.50x |" in table


def test_tuned_rows_are_the_fastest_tiles():
    product = Product(rows=256, contraction=128, columns=512, activation="swiglu")
    seconds = {DEFAULT: 1.0, "2-128-64-5-8": 3.0, "2-64-64-6-8": 2.0}
    record = make_record(product, seconds)
    twin = make_record(Product(**{**product.key(), "dense_is_transposed": False}), {DEFAULT: 1.0})
    text = describe_tuned([record, twin])
    assert eval(text.split("```python\n")[1].split(",\n```")[0].split(": ")[1]) == Tiles(
        2, 64, 64, 6
    )
    assert "(256, 128, 512, True): Tiles(" in text
    assert "2-64-64-6-8" in make_table([record], TILE_COLUMNS)
    assert describe_tuned([]) == ""
