"""What a run says of itself: lines while it trains, and the summary at its end."""

import itertools

import pytest

from sparsejax.report import progress
from sparsejax.report.progress import StepTimer, format_progress, format_summary, summarise

TOKENS = 64


def make_totals(flops):
    names = ("forward", "backward", "update", "dense_equivalent")
    return {
        phase: {"steps": 2} | {name: {"layer 0": flops} for name in names}
        for phase in ("dense", "sparse")
    }


def make_rows(dense_seconds, sparse_seconds):
    rows = []
    for first, phase, seconds in ((0, "dense", dense_seconds), (2, "sparse", sparse_seconds)):
        row = {"phase": phase, "attention_density": 1.0 if phase == "dense" else 0.25}
        rows.append(row | {"kind": "phase", "step": first, "step_memory_bytes": 3_336_980})
        for step in (first + 1, first + 2):
            rows.append(row | {"kind": "train", "step": step, "step_seconds": seconds})
    rows.append({"kind": "validation", "phase": "sparse", "step": 4, "validation_loss": 2.0})
    rows[-1]["validation_accuracy"] = 0.5
    return rows


def tell(rows, totals, **more):
    phases = ["dense", "sparse", "last"]
    summary = summarise(rows, totals, phases=phases, tokens_per_step=TOKENS)
    summary |= {"num_steps": 4, "workdir": "runs/a", "checkpoint": "runs/a/4"} | more
    return format_summary(summary, totals, phases=phases)


@pytest.mark.parametrize(
    ("dense", "sparse", "words"), [(0.4, 0.1, "4.00x faster"), (0.1, 0.118, "1.18x slower")]
)
def test_a_sparse_step_is_faster_or_slower_by_more_than_one(dense, sparse, words):
    text = tell(make_rows(dense, sparse), make_totals(1e12))
    assert f"from step 2, a step is {words} than in the dense phase" in text


def test_a_small_model_has_digits_and_units_that_fit_it():
    text = tell(make_rows(0.004, 0.001), make_totals(4.4e7))
    assert (
        "dense phase        16.0k tokens/s, 4.00 ms/step, attention density 1.000, 3.34 MB" in text
    )
    assert "MFLOPs                 forward" in text
    assert "whole run             88.000      88.000" in text


def test_what_rows_lack_the_summary_leaves_out():
    rows, totals = make_rows(0.4, 0.1), make_totals(1e12)
    without_begin = tell(rows[1:], totals)
    assert (
        "dense phase        160 tokens/s, 400 ms/step, attention density 1.000\n" in without_begin
    )
    nothing = tell([], totals, waited_until="the maps settle")
    assert "validation" not in nothing and "whole run" in nothing
    assert nothing.count("never began: it waited until the maps settle") == 1
    assert "last phase         never began" in nothing


def test_what_a_phase_began_with_may_be_a_number_a_list_or_partly_unknown():
    rows, totals = make_rows(0.4, 0.1), make_totals(1e12)
    metrics = {"untrained_share": [0.125, None], "kept": 0.5, "count": 3}
    text = tell([*rows, rows[0] | {"phase_metrics": metrics}], totals)
    expected = "began with untrained share [0.125, -], kept 0.5, count 3"
    assert f"  dense phase        {expected}" in text.splitlines()


def test_the_time_left_goes_by_the_median_of_recent_steps(monkeypatch):
    # The second step is slow; then something interrupts.
    ends = itertools.chain([0.0, 1.0, 101.0, 102.0, 103.0], [500.0, 501.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(ends))
    timer = StepTimer()
    assert timer.typical_seconds is None
    assert [timer.lap() for _ in range(5)] == [None, 1.0, 100.0, 1.0, 1.0]
    timer.interrupt()
    assert [timer.lap() for _ in range(2)] == [None, 1.0]
    assert timer.typical_seconds == 1.0
    row = {"step": 40, "phase": "sparse", "loss": 2.0, "attention_density": 0.25}
    row["weight_density"] = 0.5
    line = format_progress(
        row, num_steps=100, tokens_per_step=TOKENS, step_seconds=1.0, shown={"flip rate": 0.125}
    )
    assert line == (
        "sparse | step   40/100 | loss 2.0000 | attention density 0.250 | weight density 0.500 | "
        "flip rate 0.1250 | 64 tokens/s | 1m00s left"
    )
