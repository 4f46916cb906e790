"""Runs of two processes: what they compute and write, how they stop, fail and go on."""

import functools
import signal

import numpy as np
import pytest

from sparsejax.checkpoint.save import find_checkpoints
from sparsejax.report.metrics import read_metrics
from tests.processes.launch import Launched, write_config
from tests.training.runs import copy_until, make_settings, train

pytestmark = pytest.mark.ci


def launch(folder, workdir, own=((), ()), devices=2, **changes):
    """Start a run of the small settings, in a folder of its own for what it says."""
    said = folder / f"said{len(list(folder.glob('said*')))}"
    said.mkdir()
    config = write_config(said, make_settings(folder, **changes))
    return Launched(said, [f"--config={config}", f"--workdir={workdir}"], own, devices=devices)


def read_losses(workdir):
    """Return what each row is of, and the losses of those that have one."""
    rows = read_metrics(workdir / "metrics.jsonl")
    losses = [row.get("loss", row.get("validation_loss")) for row in rows]
    return [(row["kind"], row["step"]) for row in rows], [x for x in losses if x is not None]


def has_trained(workdir, step):
    """Tell whether a step is recorded."""
    path = workdir / "metrics.jsonl"
    return path.exists() and f'"step":{step},"kind":"train"' in path.read_text().replace(" ", "")


def list_whole(workdir):
    """Return the steps of the checkpoints that are whole, newest first."""
    return [info.step for info in find_checkpoints(workdir / "checkpoints") if not info.problem]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two processes, with a part of the state each, through a switch, with pictures."""
    folder = tmp_path_factory.mktemp("finished")
    run = launch(folder, folder / "run", mesh__fsdp=4)
    assert run.wait() == [0, 0], run.explain()
    return folder, run


def test_two_processes_train_as_one_does_and_write_once(finished):
    folder, run = finished
    for name in ("training.png", "attention_patterns.png", "summary.json", "flops.json"):
        assert (folder / "run" / name).stat().st_size
    assert len(list((folder / "run" / "tensorboard").iterdir())) == 1
    assert run.read_own(0)[-1].startswith("  checkpoint ") and run.read_own(1) == []
    alone = launch(folder, folder / "alone", own=((),), devices=4)
    assert alone.wait() == [0], alone.explain()
    rows, losses = read_losses(folder / "run")
    same_rows, same_losses = read_losses(folder / "alone")
    assert rows == same_rows
    np.testing.assert_allclose(losses, same_losses, rtol=1e-5)


@pytest.mark.slow
def test_two_processes_go_on_where_one_was(finished):
    folder, _ = finished
    workdir, settings = folder / "began alone", make_settings(folder)
    assert train(settings | {"num_steps": 8, "schedule_steps": 10}, workdir) is not None
    run = launch(folder, workdir, mesh__fsdp=4)
    assert run.wait() == [0, 0], run.explain()
    assert any("processes: None -> '2'" in line for line in run.read_own(0))
    losses = [row["loss"] for row in read_metrics(workdir / "metrics.jsonl") if "loss" in row]
    expected = [
        row["loss"] for row in read_metrics(folder / "run" / "metrics.jsonl") if "loss" in row
    ]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_one_process_goes_on_where_two_were(finished):
    folder, _ = finished
    workdir = copy_until(folder / "run", 8, folder / "goes on")
    assert train(make_settings(folder), workdir) is not None
    rows, losses = read_losses(workdir)
    assert (rows, len(losses)) == (read_losses(folder / "run")[0], 12)
    np.testing.assert_allclose(losses, read_losses(folder / "run")[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("index", "number"),
    [(1, signal.SIGTERM), pytest.param(0, signal.SIGINT, marks=pytest.mark.slow)],
)
def test_a_signal_to_one_stops_all_after_the_same_step(tmp_path, index, number):
    workdir = tmp_path / "run"
    long = {"recipe__name": "dense", "num_steps": 1000, "eval_every_steps": 1000}
    run = launch(tmp_path, workdir, **long)
    run.wait_until(functools.partial(has_trained, workdir, 2))
    run.processes[index].send_signal(number)
    assert run.wait() == [0, 0], run.explain()
    stopped, resume = run.read_own(0)[-2:]
    newest = list_whole(workdir)[0]
    cause = "SIGINT" if index == 0 else "a signal to one of the processes"
    assert stopped.startswith(f"stopped by {cause}; ") and f"step {newest} is saved" in stopped
    assert resume.startswith("resume with: ") and run.read_own(1) == []
    assert read_losses(workdir)[0][-1] == ("train", newest)


@pytest.mark.slow
def test_after_a_kill_during_a_save_the_run_goes_on_from_the_last_whole_checkpoint(tmp_path):
    workdir, long = tmp_path / "run", {"recipe__name": "dense", "eval_every_steps": 1000}
    run = launch(tmp_path, workdir, num_steps=1000, **long)
    checkpoints = workdir / "checkpoints"

    def saves():
        return list_whole(workdir) and any(".tmp" in x.name for x in checkpoints.iterdir())

    run.wait_until(saves)
    run.processes[0].kill()
    assert run.wait() == [-signal.SIGKILL, 3], run.explain()
    assert run.read_errors(1)[-1].endswith("the same command goes on from the last checkpoint")
    last = list_whole(workdir)[0]
    # The schedule is that of the run's start, so that it goes on as it was.
    assert train(make_settings(tmp_path, num_steps=last + 2, **long), workdir) is not None
    steps = [step for kind, step in read_losses(workdir)[0] if kind == "train"]
    assert steps == list(range(1, last + 3))
    assert list_whole(workdir)[0] == last + 2
    assert not any(".tmp" in path.name for path in checkpoints.iterdir())


@pytest.mark.slow
def test_a_setting_that_differs_ends_all(tmp_path):
    run = launch(tmp_path, tmp_path / "run", own=((), ("--config.optimizer.weight_decay=0.5",)))
    assert run.wait() == [2, 2], run.explain()
    ((told,), others) = run.read_errors(0), run.read_errors(1)
    assert told.startswith("error: all processes must have the same settings, got config.optimizer")
    assert told.endswith(" in process 0 and 0.5 in process 1") and others == []
    assert not (tmp_path / "run").exists()
