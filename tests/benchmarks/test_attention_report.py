"""Shares, speed-ups, targets and the plot are those of the records they are made from."""

import pytest

from benchmarks.attention_problems import Problem
from benchmarks.attention_report import (
    COLUMNS,
    TARGETS,
    collect_speedups,
    evaluate_targets,
    plot_speedups,
    share_of_cudnn,
)
from benchmarks.attention_torch import FLEX, SDPA
from benchmarks.records import make_table

LARGE = {"length": 4096, "block": 128, "head_dim": 128, "dtype": "bfloat16"}


def make_record(seconds, rates=None, device="NVIDIA H200", **settings):
    values = {name: {"median_seconds": s} for name, s in seconds.items()}
    for name, rate in (rates or {}).items():
        values.setdefault(name, {})["tflops_per_second"] = rate
    facts = {"device": device, "jax": "1", "python": "3", "date": "2026-01-02 03:04"}
    key = {**Problem(**{**LARGE, **settings}).key(), "device": device}
    return {"key": key, "values": values, "environment": facts}


def make_densities(**settings):
    return [
        make_record(
            {"mosaic_sm90": density, "cudnn": 0.5, FLEX: 2 * density},
            density=density,
            pattern="full" if density == 1.0 else "random",
            **settings,
        )
        for density in (0.6, 0.1, 1.0)
    ]


def outcomes(records):
    return [line.split(":")[0] for line in evaluate_targets(records).splitlines()]


def test_without_records_nothing_is_measured():
    assert outcomes([]) == ["not measured"] * len(TARGETS)


@pytest.mark.parametrize("share, outcome", [(0.66, "met"), (0.64, "missed")])
def test_forward_target(share, outcome):
    rates = {"mosaic_sm90": 600 * share, "cudnn": 600}
    record = make_record({}, rates, backward=False)
    assert share_of_cudnn(record, "mosaic_sm90") == pytest.approx(share)
    assert outcomes([record])[:2] == [outcome, "not measured"]
    for change in ({"length": 2048}, {"block": 64}, {"head_dim": 64}):
        other = make_record({}, rates, backward=False, **change)
        assert outcomes([other])[0] == "not measured"


def test_one_bad_point_misses_a_target():
    good = make_record({}, {"mosaic_sm90": 61, "cudnn": 100})
    bad = make_record({}, {"mosaic_sm90": 59, "cudnn": 100}, length=8192)
    assert outcomes([good])[1] == "met"
    assert "missed: forward + backward" in evaluate_targets([good, bad])
    assert "worst of 2: 0.59, NVIDIA H200" in evaluate_targets([good, bad])


def test_targets_against_flex_cudnn_and_the_schedule():
    assert outcomes(make_densities())[2:5] == ["met", "missed", "not measured"]
    slow = make_record({"mosaic_sm90": 2.0, FLEX: 1.9})
    assert outcomes([slow])[2] == "missed"
    fast = make_record({"mosaic_sm90": 0.5, "cudnn": 0.5}, density=0.6)
    assert outcomes([fast])[3] == "met"
    for seconds, outcome in ((0.019, "met"), (0.021, "missed")):
        record = make_record({"mosaic_sm90": 1.0, "schedule": seconds}, measure="schedule")
        assert outcomes([record])[4] == outcome


def test_targets_of_the_kernels_in_triton():
    for share, outcome in ((0.51, "met"), (0.49, "missed")):
        record = make_record({}, {"triton": 100 * share, "cudnn": 100}, backward=False)
        assert outcomes([record])[6] == outcome
        record = make_record({}, {"triton": 100 * (share - 0.05), "cudnn": 100})
        assert outcomes([record])[7] == outcome
    slow = make_record({"triton": 2.0, FLEX: 1.9})
    assert outcomes([slow])[5] == "missed"
    # Where nearly everything is kept, no claim is made.
    assert outcomes([make_record({"triton": 2.0, FLEX: 1.9}, density=0.9)])[5] == "not measured"


def test_speedups_come_from_one_device_and_one_setting():
    records = make_densities()
    others = make_densities(device="NVIDIA H100") + make_densities(causal=True)[:2]
    dense, lines = collect_speedups(records + others, "NVIDIA H200")
    assert dense == "cudnn"
    assert list(lines["mosaic_sm90"]) == [0.1, 0.6, 1.0]
    assert lines["mosaic_sm90"][0.1] == pytest.approx(5.0)
    assert lines[FLEX][1.0] == pytest.approx(0.25)
    assert "cudnn" not in lines
    assert collect_speedups(records[:2], "NVIDIA H200") == ("", {})


@pytest.mark.parametrize("measured_at", [(), (0.1, 0.2), (0.1, 0.2, 0.5)])
def test_without_cudnn_dense_is_that_of_pytorch_or_of_jax(measured_at):
    records = []
    for density in (0.1, 0.2, 0.5):
        seconds = {"xla": density, "jax.nn": 1.0}
        seconds |= {SDPA: 0.5} if density in measured_at else {}
        records.append(make_record(seconds, density=density, dtype="float32"))
    dense, lines = collect_speedups(records, "NVIDIA H200")
    if len(measured_at) == 3:
        assert dense == SDPA and lines["xla"] == {0.1: 5.0, 0.2: 2.5, 0.5: 1.0}
    else:
        assert dense == "jax.nn" and lines["xla"] == {0.1: 10.0, 0.2: 5.0, 0.5: 2.0}


def test_the_plot_is_drawn_or_says_why_not(tmp_path, monkeypatch):
    path = tmp_path / "attention_density.png"
    assert "needs three densities" in plot_speedups([], "NVIDIA H200", path)
    assert plot_speedups(make_densities(), "NVIDIA H200", path).endswith("drawn")
    assert path.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert "matplotlib is not installed" in plot_speedups(make_densities(), "NVIDIA H200", path)


def test_the_table_gives_shares_of_cudnn_and_of_the_peak():
    record = make_record({"mosaic_sm90": 1e-3}, {"mosaic_sm90": 494.5, "cudnn": 600})
    table = make_table([record], COLUMNS)
    assert "| 494 | 82 % | 50 % |" in table
    assert "schedule ms" not in table and "hand-written" not in table
