"""Training experiments: every run once, resumable, grouped, and never timed on a busy machine."""

import dataclasses
import os
import sys

import pytest

from benchmarks import experiments
from benchmarks.experiments import Experiment, Setting, run_experiment

# Stands in for train.py: notes each call, fails where told to, else ends with a loss of its seed.
TRAINER = """
import json, pathlib, sys
flags = dict(argument.lstrip("-").split("=", 1) for argument in sys.argv[1:])
workdir = pathlib.Path(flags["workdir"])
with open(workdir.parent / "calls", "a") as calls:
    print(workdir.name, file=calls)
if flags.get("config.fail"):
    sys.exit("told to fail")
loss = int(flags["config.seed"]) + float(flags.get("config.offset", 0))
lines = [{"step": s, "validation_loss": loss + 1 / s} for s in (1, 2)] + [{"step": 2, "loss": 0}]
(workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
(workdir / "summary.json").write_text(json.dumps({"validation_loss": loss, "workdir": "there"}))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    environment = {"device": "a CPU", "jax": "0.11.2", "date": "2026-01-02 03:04"}
    monkeypatch.setattr(experiments, "_describe_environment", lambda: environment)
    (tmp_path / "trainer.py").write_text(TRAINER)
    folders = {"runs_dir": tmp_path / "runs", "results_dir": tmp_path / "results"}
    return lambda experiment: run_experiment(
        experiment, trainer=(sys.executable, str(tmp_path / "trainer.py")), **folders
    )


@pytest.fixture
def calls(tmp_path):
    return lambda: (tmp_path / "runs" / "study" / "calls").read_text().split()


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
    curves = {"validation_loss": [[1, 1.0], [2, 0.5]]}
    assert values == {"summary": {"validation_loss": 0.0}, "curves": curves}


def test_a_failed_run_keeps_the_finished_ones(run, calls):
    broken = dataclasses.replace(
        STUDY,
        settings={**STUDY.settings, "sparse": Setting(config="a.py", overrides={"fail": 1})},
    )
    with pytest.raises(RuntimeError, match="exit code 1 and no summary; see .*sparse-0.log"):
        run(broken)
    run(STUDY)
    assert calls() == ["dense-0", "sparse-0", "sparse-0", "dense-2", "sparse-2"]


def test_a_changed_setting_is_run_again_and_replaces_the_old_row(run, calls, tmp_path):
    one_seed = dataclasses.replace(STUDY, seeds=(0,))
    run(one_seed)
    changed = {**STUDY.settings, "sparse": Setting(config="a.py", overrides={"offset": 3})}
    run(dataclasses.replace(one_seed, settings=changed))
    assert calls() == ["dense-0", "sparse-0", "sparse-0"]
    assert "| sparse | 1 | 3 | – |" in (tmp_path / "results" / "study.md").read_text()


def test_timing_takes_the_median_and_refuses_a_busy_machine(run, calls, tmp_path, monkeypatch):
    timing = dataclasses.replace(STUDY, kind="timing", seeds=(0, 1, 5))
    monkeypatch.setattr(experiments, "_count_busy_cores", lambda: 0.1)
    run(timing)
    assert "| dense | 3 | 1 (0 to 5) | – |" in (tmp_path / "results" / "study.md").read_text()

    monkeypatch.setattr(experiments, "_count_busy_cores", lambda: 1.5)
    with pytest.raises(RuntimeError, match=r"1.5 cores are busy \(max_busy_cores=0.2\)"):
        experiments._wait_until_idle(0.2, patience_seconds=0.0)


def test_busy_cores_are_between_none_and_all():
    assert 0.0 <= experiments._count_busy_cores(0.05) <= (os.cpu_count() or 1)
