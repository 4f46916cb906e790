"""Runs of two processes: what they compute and write, how they stop, fail and go on."""

import shutil

import numpy as np
import pytest

from sparsejax.checkpoint.save import find_checkpoints
from sparsejax.report.metrics import read_metrics
from tests.processes.launch import Launched, write_config
from tests.training.runs import make_settings

pytestmark = pytest.mark.ci


def launch(folder, workdir, own=((), ()), devices=2, **changes):
    """Start a run of the small settings in a folder of its own for what it says."""
    said = folder / f"said{len(list(folder.glob('said*')))}"
    said.mkdir()
    config = write_config(said, make_settings(folder, **changes))
    return Launched(said, [f"--config={config}", f"--workdir={workdir}"], own, devices=devices)


def read_losses(workdir):
    rows = read_metrics(workdir / "metrics.jsonl")
    return [(row["kind"], row["step"], row.get("loss", row.get("validation_loss"))) for row in rows]


def list_steps(workdir):
    return [info.step for info in find_checkpoints(workdir / "checkpoints") if not info.problem]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two processes through a switch, with pictures."""
    folder = tmp_path_factory.mktemp("finished")
    run = launch(folder, folder / "run")
    assert run.wait() == [0, 0], run.explain()
    return folder, run


def test_two_processes_train_as_one_and_write_once(finished):
    folder, run = finished
    for name in ("training.png", "attention_patterns.png", "summary.json", "flops.json"):
        assert (folder / "run" / name).stat().st_size
    assert len(list((folder / "run" / "tensorboard").iterdir())) == 1
    assert "finished 10 steps" in run.read_out(0)
    assert [x for x in run.read_out(1).splitlines() if not x.startswith("[Gloo]")] == []
    alone = launch(folder, folder / "alone", own=((),), devices=4)
    assert alone.wait() == [0], alone.explain()
    names, steps, losses = zip(*read_losses(folder / "run"), strict=True)
    same_names, same_steps, same_losses = zip(*read_losses(folder / "alone"), strict=True)
    assert (names, steps) == (same_names, same_steps)
    np.testing.assert_allclose([x for x in losses if x], [x for x in same_losses if x], rtol=1e-5)
    # The one process goes on where the two were, and the other way round.
    for source, own, devices in (("run", ((),), 4), ("alone", ((), ()), 2)):
        workdir = folder / f"{source}-goes-on"
        shutil.copytree(folder / source, workdir)
        more = launch(folder, workdir, own=own, devices=devices, num_steps=12)
        assert more.wait() == [0] * len(own), more.explain()
        assert f"resuming {workdir} at step 10" in more.read_out(0)
        assert "processes: " in more.read_out(0)
    np.testing.assert_allclose(
        [x[2] for x in read_losses(folder / "run-goes-on")[-3:]],
        [x[2] for x in read_losses(folder / "alone-goes-on")[-3:]],
        rtol=1e-5,
    )
