"""Training experiments: every run once, resumable, tuned, and never timed on a busy machine."""

import dataclasses
import os
import sys

import pytest

from benchmarks.experiments import running
from benchmarks.experiments.plan import Comparison, Experiment, Setting, Tuning
from benchmarks.experiments.running import (
    choose_candidates,
    group_by_row,
    list_runs,
    run_experiment,
    train_again,
)
from benchmarks.experiments.tables import compare_runs, write_report
from benchmarks.records import Results

# Stands in for train.py: notes each call, fails where told to, else ends with a loss of its seed.
TRAINER = """
import json, os, pathlib, sys
flags = dict(argument.lstrip("-").split("=", 1) for argument in sys.argv[1:])
workdir = pathlib.Path(flags["workdir"])
with open(workdir.parent / "calls", "a") as calls:
    print(workdir.name.rpartition("-")[0], *os.sched_getaffinity(0), file=calls)
if flags.get("config.fail"):
    sys.exit("told to fail")
summary = {"dense_step_seconds": 3.0, "workdir": "there"}
loss = int(flags["config.seed"]) + float(flags.get("config.offset", 0))
lines = [{"step": s, "validation_loss": loss + 1 / s} for s in (1, 2)] + [{"step": 2, "loss": 0}]
(workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
(workdir / "summary.json").write_text(json.dumps(summary | {"validation_loss": loss}))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    environment = {"device": "a CPU", "jax": "0.11.2", "date": "2026-01-02 03:04"}
    monkeypatch.setattr(running, "_describe_environment", lambda: dict(environment))
    (tmp_path / "trainer.py").write_text(TRAINER)
    folders = {"runs_dir": tmp_path / "runs", "results_dir": tmp_path / "results"}

    def run(experiment, **options):
        trainer = (sys.executable, str(tmp_path / "trainer.py"))
        results = run_experiment(experiment, trainer=trainer, **folders, **options)
        write_report(experiment, results, tmp_path / "results")
        return results

    return run


@pytest.fixture
def calls(tmp_path):
    def read(column=0):
        lines = (tmp_path / "runs" / "study" / "calls").read_text().splitlines()
        return [line.split()[column] for line in lines]

    return read


STUDY = Experiment(
    name="study",
    kind="quality",
    settings={
        "dense": Setting(config="configs/a.py"),
        "sparse": Setting(config="configs/a.py", overrides={"offset": 0.5}),
    },
    seeds=(0, 2),
    columns={"loss": "validation_loss", "unknown": "no_such_key"},
)


def test_runs_every_setting_with_every_seed_once(run, calls, tmp_path):
    run(STUDY)
    run(STUDY)
    assert calls() == ["dense-0", "sparse-0", "dense-2", "sparse-2"]
    table = (tmp_path / "results" / "study.md").read_text()
    assert "| dense | 2 | 1.0000 ± 1.4142 | – |" in table
    assert "| sparse | 2 | 1.5000 ± 1.4142 | – |" in table
    assert (tmp_path / "results" / "study.png").read_bytes().startswith(b"\x89PNG")


def test_records_hold_curves_and_no_path(run):
    values = run(STUDY).records[0]["values"]
    assert values.pop("seconds") >= 0
    curves = {"validation_loss": [[1, 1.0], [2, 0.5]]}
    assert values == {"summary": {"validation_loss": 0.0}, "curves": curves}


def test_a_failed_run_keeps_the_finished_ones(run, calls):
    broken = dataclasses.replace(
        STUDY,
        settings={**STUDY.settings, "sparse": Setting(config="a.py", overrides={"fail": 1})},
    )
    with pytest.raises(RuntimeError, match="exit code 1 and no summary; see .*sparse-0-.*log"):
        run(broken)
    assert calls()[:2] == ["dense-0", "sparse-0"] and "sparse-2" not in calls()
    run(STUDY)
    assert sorted(calls()) == ["dense-0", "dense-2", "sparse-0", "sparse-0", "sparse-2"]


def test_a_changed_setting_is_run_again_and_replaces_the_old_row(run, calls, tmp_path):
    one_seed = dataclasses.replace(STUDY, seeds=(0,))
    run(one_seed)
    changed = {**STUDY.settings, "sparse": Setting(config="a.py", overrides={"offset": 3})}
    run(dataclasses.replace(one_seed, settings=changed))
    assert calls() == ["dense-0", "sparse-0", "sparse-0"]
    assert "| sparse | 1 | 3 | – |" in (tmp_path / "results" / "study.md").read_text()


def test_timing_takes_the_median_and_refuses_a_busy_machine(run, calls, tmp_path, monkeypatch):
    timing = dataclasses.replace(STUDY, kind="timing", seeds=(0, 1, 5))
    monkeypatch.setattr(running, "_count_busy_cores", lambda: 0.1)
    run(timing)
    assert "| dense | 3 | 1 (0 to 5) | – |" in (tmp_path / "results" / "study.md").read_text()

    monkeypatch.setattr(running, "_count_busy_cores", lambda: 1.5)
    with pytest.raises(RuntimeError, match=r"1.5 cores are busy \(max_busy_cores=0.2\)"):
        running._wait_until_idle(0.2, patience_seconds=0.0)


def test_busy_cores_are_between_none_and_all():
    assert 0.0 <= running._count_busy_cores(0.05) <= (os.cpu_count() or 1)


def test_runs_at_a_time_have_a_core_each(run, calls, tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    run(STUDY, workers=min(2, len(cores)))
    assert sorted(calls()) == ["dense-0", "dense-2", "sparse-0", "sparse-2"]
    assert set(map(int, calls(1))) <= set(cores[:2])
    lines = (tmp_path / "runs" / "study" / "calls").read_text().splitlines()
    assert all(len(line.split()) == 2 for line in lines), lines
    with pytest.raises(ValueError, match=f"workers must be from 1 to {len(cores)}, got 99"):
        run(STUDY, workers=99)


TUNED = dataclasses.replace(
    STUDY,
    settings={
        "dense": Setting(config="a.py", tuned="dense"),
        "sparse": Setting(config="a.py", overrides={"more": 1}, tuned="sparse"),
    },
    tuning=Tuning(
        settings={"dense": Setting(config="a.py"), "sparse": Setting(config="a.py")},
        candidates={
            "dense": ({"offset": 5.0}, {"offset": 0.25}, {"offset": 0.5}),
            "sparse": ({"offset": 0.125}, {"offset": 4.0}, {"offset": 3.0}),
        },
        seeds=(10, 11),
    ),
)


def test_settings_train_with_their_best_candidate_of_other_seeds(run, calls):
    results = run(TUNED)
    assert choose_candidates(TUNED, results) == {
        "dense": {"offset": 0.25},
        "sparse": {"offset": 0.125},
    }
    rows = group_by_row(TUNED, results)
    losses = {
        row: [record["values"]["summary"]["validation_loss"] for record in records]
        for row, records in rows.items()
    }
    assert losses == {"dense": [0.25, 2.25], "sparse": [0.125, 2.125]}
    assert len(calls()) == 2 * 3 * 2 + 4
    run(TUNED)
    assert len(calls()) == 2 * 3 * 2 + 4
    # A row that would be chosen otherwise is not taken for the one that was.
    (first, *_) = list_runs(TUNED, results)
    assert first.key["overrides"] == '{"offset": 0.25}'
    curves = {record["key"]["kind"]: record["values"]["curves"] for record in results.records}
    assert curves["tuning"] == {} and curves["quality"]["validation_loss"]


def test_nothing_is_reported_before_the_tuning_is_complete(run, tmp_path):
    results = run(TUNED)
    kept = Results(tmp_path / "part.json")
    for record in results.records[1:]:
        kept.record(record["key"], record["values"], record["environment"])
    assert group_by_row(TUNED, kept) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": (0, 11)}, r"study: seeds \[11\] are both tuned on and reported"),
        ({"tuning": None}, "study: settings are tuned as .*, not in set"),
        (
            {"comparisons": [Comparison(row="x", against="dense", metric="loss", better="less")]},
            r"study: \['x'\] are no settings",
        ),
        (
            {"comparisons": [Comparison(row="dense", against="sparse", metric="y", better="less")]},
            r"study: \['y'\] are no columns",
        ),
        ({"headline": "z"}, r"study: \['z'\] are no settings"),
    ],
    ids=str,
)
def test_names_that_do_not_belong_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TUNED, **changes)


def test_every_setting_is_tuned_at_equal_cost():
    assert TUNED.tuning is not None
    candidates = dict(TUNED.tuning.candidates, sparse=({"offset": 1.0},))
    with pytest.raises(ValueError, match="equally many for each setting, got {'dense': 3, 'spa"):
        dataclasses.replace(TUNED.tuning, candidates=candidates)


def test_settings_may_depend_on_the_seed(run):
    experiment = dataclasses.replace(STUDY, by_seed=lambda seed: {"offset": 10.0 * seed})
    losses = [r["values"]["summary"]["validation_loss"] for r in run(experiment).records]
    assert losses == [0.0, 0.0, 22.0, 22.0]


def test_a_measure_of_the_folder_joins_the_record(run):
    experiment = dataclasses.replace(
        STUDY, measure=lambda folder: {"files": len([*folder.iterdir()])}
    )
    assert run(experiment).records[0]["values"]["summary"] == {"validation_loss": 0.0, "files": 2}


def test_a_row_trained_again_is_compared_to_the_printed_digits(run, tmp_path):
    results = run(STUDY)
    first = list_runs(STUDY, results, tmp_path / "again")[0]
    trainer = (sys.executable, str(tmp_path / "trainer.py"))
    again = train_again(STUDY, first, trainer=trainer)
    text, equal = compare_runs(STUDY, results[first.key], again)
    assert equal and "differs" not in text
    again["values"]["summary"]["validation_loss"] = 1.0
    text, equal = compare_runs(STUDY, results[first.key], again)
    assert not equal and "differs" in text
    # Another kind of CPU may round otherwise.
    again["environment"]["device"] = "another CPU"
    text, equal = compare_runs(STUDY, results[first.key], again)
    assert equal and "recorded on a CPU, now another CPU: digits may differ" in text


def test_comparisons_are_judged_seed_by_seed(run, tmp_path):
    compare = [
        Comparison(row="sparse", against="dense", metric="loss", better="less"),
        Comparison(row="sparse", against="dense", metric="loss", better="less", margin=0.6),
        Comparison(row="sparse", against="dense", metric="loss", better="less", margin=0.4),
    ]
    # Every pair differs by .5 of 1; seeds differ by far more.
    run(dataclasses.replace(STUDY, comparisons=compare))
    lines = (tmp_path / "results" / "study.md").read_text().splitlines()[-3:]
    assert all("| sparse – dense | loss | +0.5000 ± 0.0000 | 0 of 2 |" in line for line in lines)
    assert "sparse has more loss than dense" in lines[0]
    assert "within 60 % of dense (TOST; +50.0 % to +50.0 % worse, 90 %)" in lines[1]
    assert "more than 40 % worse than dense" in lines[2]
