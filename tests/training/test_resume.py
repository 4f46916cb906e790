"""A run that is killed and resumed ends in the same bits as one that is not."""

import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from sparsejax import command
from sparsejax.checkpoint import save
from sparsejax.checkpoint.save import find_checkpoints, restore
from sparsejax.config.parse import ConfigError, parse_config
from sparsejax.report.metrics import read_metrics
from sparsejax.tools.evaluate import evaluate
from sparsejax.training import loop
from sparsejax.training.setup import prepare_run
from tests.checkpoint.saves import fill_disk_for
from tests.tiers import tier
from tests.training.runs import (
    NUM_STEPS,
    assert_documented,
    copy_until,
    make_settings,
    train,
    train_and_listen,
)

_ROOT = pathlib.Path(__file__).parents[2]
_KEEP = {"checkpoint__keep_last": NUM_STEPS}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return make_settings(tmp_path_factory.mktemp("corpus"), **_KEEP)


@pytest.fixture(scope="module")
def recorded(settings, tmp_path_factory):
    """An uninterrupted run, its summary, and in order what it said and when JAX compiled."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    summary, events = train_and_listen(settings, workdir)
    return workdir, summary, events


@pytest.fixture
def uninterrupted(recorded):
    return recorded[:2]


def _write_command(settings, workdir):
    """Return the command line of a run whose settings stand in a file beside it."""
    config = workdir.with_suffix(".py")
    config.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({settings!r})\n"
    )
    return [sys.executable, "train.py", f"--config={config}", f"--workdir={workdir}"]


def _start(settings, workdir, stop_after_step, number):
    """Start train.py and send it a signal once it has shown a step."""
    lines = []
    with subprocess.Popen(
        _write_command(settings, workdir), cwd=_ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            lines.append(line)
            if f"step {stop_after_step:>{len(str(NUM_STEPS)) + 1}}/{NUM_STEPS}" in line:
                process.send_signal(number)
    return process.returncode, "".join(lines)


def _final_state(settings, workdir):
    info = find_checkpoints(workdir / "checkpoints")[0]
    assert (info.step, info.problem) == (settings["num_steps"], None)
    run = prepare_run(parse_config(settings))
    return restore(info, run.make_abstract_state(info.metadata["phase"]))


def _numbers(workdir):
    """Everything in the metrics that does not depend on the clock."""
    clock = ("step_seconds", "tokens_per_second", "probing_step_seconds", "compile_seconds")
    rows = read_metrics(workdir / "metrics.jsonl")
    return [{name: row[name] for name in row if name not in clock} for row in rows]


def _assert_same_end(settings, workdir, reference):
    (state, data_state), (expected, expected_data_state) = (
        _final_state(settings, folder) for folder in (workdir, reference)
    )
    assert data_state == expected_data_state
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected), strict=True
    ):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf, other = jax.random.key_data(leaf), jax.random.key_data(other)
        assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes(), path
    # Repr, because NaN is not equal to itself.
    assert repr(_numbers(workdir)) == repr(_numbers(reference))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_the_command_resumes_bit_for_bit(settings, uninterrupted, tmp_path, capsys):
    # In this process: importing everything anew would take longer than the steps.
    workdir = copy_until(uninterrupted[0], 6, tmp_path / "run")
    _, *argv = _write_command(settings, workdir)
    with pytest.raises(SystemExit) as end:
        command.run(argv, resume_command="the same command")
    assert end.value.code == 0
    assert f"resuming {workdir} at step 6" in capsys.readouterr().out
    _assert_same_end(settings, workdir, uninterrupted[0])


@pytest.mark.parametrize(
    "step", tier({"before": 3, "at": 6, "after": 8}, fast=(), slow=["before", "after"])
)
def test_kill_and_resume_is_bit_exact(step, settings, uninterrupted, tmp_path):
    code, _ = _start(settings, tmp_path, step, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert find_checkpoints(tmp_path / "checkpoints")[0].step < NUM_STEPS
    assert train(settings, tmp_path) is not None
    _assert_same_end(settings, tmp_path, uninterrupted[0])


@pytest.mark.slow
def test_sigterm_saves_and_exits_cleanly(settings, uninterrupted, tmp_path):
    code, output = _start(settings, tmp_path, 4, signal.SIGTERM)
    assert code == 0
    assert "stopped by SIGTERM" in output
    assert f"--workdir={tmp_path}" in output[output.index("resume with: ") :]
    saved = find_checkpoints(tmp_path / "checkpoints")[0]
    assert saved.problem is None
    assert 4 <= saved.step < NUM_STEPS
    train(settings, tmp_path)
    _assert_same_end(settings, tmp_path, uninterrupted[0])


def _send_signal_in(monkeypatch, owner, name, number):
    """Let a signal arrive whenever a function is entered; the second in a row would kill."""
    function = getattr(owner, name)

    def receive_signal(*arguments, **options):
        if signal.getsignal(number) != signal.SIG_DFL:
            os.kill(os.getpid(), number)
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, receive_signal)


@pytest.fixture
def hangup():
    """SIGHUP as a terminal sends it, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.usefixtures("hangup")
def test_a_signal_at_any_moment_ends_the_run_where_it_resumes_bit_for_bit(
    settings, uninterrupted, tmp_path, monkeypatch, capsys
):
    moments = [
        (loop, "compile_phase", signal.SIGTERM, 1),
        (loop._Loop, "_report", signal.SIGINT, 2),
        (loop.Checkpointer, "save", signal.SIGHUP, 4),
        (loop, "compute_validation", signal.SIGTERM, 6),
        (loop._Loop, "_enter_phase", signal.SIGHUP, 6),
    ]
    workdir = tmp_path / "run"
    for owner, name, number, step in moments:
        with monkeypatch.context() as patch:
            _send_signal_in(patch, owner, name, number)
            assert train(settings, workdir) is None
        newest = find_checkpoints(workdir / "checkpoints")[0]
        assert (newest.step, newest.problem) == (step, None)
        said = f"stopped by {signal.Signals(number).name}; step {step} is saved in {newest.path}"
        assert said in capsys.readouterr().out
        if name == "compute_validation":
            # So that the run comes to the end of its phase once more.
            shutil.rmtree(newest.path)
    _send_signal_in(monkeypatch, loop, "finish_run", signal.SIGTERM)
    assert train(settings, workdir) is not None, "what is trained is finished"
    _assert_same_end(settings, workdir, uninterrupted[0])


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_an_interrupt_before_training_ends_at_once(settings, tmp_path, monkeypatch, capsys):
    _send_signal_in(monkeypatch, loop, "prepare_run", signal.SIGINT)
    _, *argv = _write_command(settings, tmp_path / "run")
    with pytest.raises(SystemExit) as end:
        command.run([*argv, "--doctor=off"], resume_command="the same command")
    assert end.value.code == 130
    assert "the same command goes on from the last checkpoint" in capsys.readouterr().err


def test_finished_run_says_so_and_trains_no_more(settings, uninterrupted, capsys):
    workdir, summary = uninterrupted
    before = (workdir / "metrics.jsonl").read_bytes()
    assert train(settings, workdir) == summary
    assert f"{workdir} is finished" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_an_extended_run_ends_like_one_that_was_planned_so_long(
    settings, uninterrupted, tmp_path, capsys
):
    extended, planned = tmp_path / "extended", tmp_path / "planned"
    shutil.copytree(uninterrupted[0], extended)
    longer = settings | {"num_steps": NUM_STEPS + 4, "log_every_steps": 7}
    train(longer, extended)
    said = capsys.readouterr().out
    assert f"note: changed from here: num_steps: {NUM_STEPS} -> {NUM_STEPS + 4}" in said
    assert f"note: the schedule ends at step {NUM_STEPS}; the steps after it train" in said
    train(longer | {"schedule_steps": NUM_STEPS}, planned)
    _assert_same_end(longer, extended, planned)


def test_a_run_cannot_become_shorter_than_it_is(settings, uninterrupted):
    message = rf"num_steps must be at least {NUM_STEPS}, the step that .* has reached, got 4"
    with pytest.raises(ConfigError, match=message):
        train(settings | {"num_steps": 4}, uninterrupted[0])


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(
    "name",
    [
        "summary.json",
        pytest.param("flops.json", marks=pytest.mark.ci),
        pytest.param("training.png", marks=pytest.mark.ci),
    ],
)
def test_a_full_disk_at_the_end_is_named_and_the_same_command_ends_the_run(
    name, settings, uninterrupted, tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted[0], workdir)
    (workdir / name).unlink()
    _, *argv = _write_command(settings, workdir)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        fill_disk_for(name, patch)
        command.run([*argv, "--doctor=off"], resume_command="the same command")
    assert end.value.code == 1
    assert capsys.readouterr().err == (
        f"error: [Errno 28] No space left on device: '{workdir / name}'\n"
    )
    assert not (workdir / name).exists()
    train(settings, workdir)
    assert (workdir / name).exists()


def test_a_finished_run_is_summarised_from_what_is_left_of_its_metrics(
    settings, uninterrupted, tmp_path, capsys
):
    workdir = copy_until(uninterrupted[0], NUM_STEPS, tmp_path / "run")
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"dense"' not in line))
    summary = train(settings, workdir)
    assert "warning: " in (output := capsys.readouterr().out) and "lacks steps 1-6;" in output
    assert summary["training_flops"] == uninterrupted[1]["training_flops"]
    assert "dense_first_step" not in summary and summary["sparse_first_step"] == 6
    # Without losses there is nothing to draw.
    path.write_text("".join(line for line in lines if '"kind": "phase"' in line))
    (workdir / "training.png").unlink()
    assert "validation_loss" not in train(settings, workdir)
    assert not (workdir / "training.png").exists()
    path.unlink()
    capsys.readouterr()
    train(settings, workdir)
    output = capsys.readouterr().out
    assert f"{path} lacks steps 1-{NUM_STEPS};" in output and "never began" not in output
    path.write_text("garbage\n" + "".join(lines))
    with pytest.raises(ConfigError, match=r"metrics.jsonl, line 1, must be .* got b'garbage"):
        train(settings, workdir)


def test_what_was_opened_is_closed_if_the_metrics_are_garbage(settings, uninterrupted, tmp_path):
    workdir = copy_until(uninterrupted[0], 9, tmp_path / "run")
    (workdir / "metrics.jsonl").write_text("garbage\n")
    filters = [*logging.getLogger("absl").filters]
    with pytest.raises(ConfigError, match="metrics.jsonl, line 1, must be"):
        train(settings, workdir)
    assert logging.getLogger("absl").filters == filters
    assert not any(thread.name.startswith("checkpoint") for thread in threading.enumerate())


def test_checkpoints_of_a_finished_run_that_cannot_be_opened_are_named(
    settings, uninterrupted, tmp_path, monkeypatch
):
    workdir = copy_until(uninterrupted[0], NUM_STEPS, tmp_path / "run")
    (workdir / "checkpoints" / "00000099.tmp").mkdir()
    monkeypatch.setattr(save, "delete_leftover", lambda path: os.stat(path / "absent"))
    with pytest.raises(ConfigError, match="directory=.*checkpoints must be a writable folder"):
        train(settings, workdir)


@pytest.mark.ci
def test_a_run_whose_metrics_were_deleted_says_so_and_ends(
    settings, uninterrupted, tmp_path, capsys
):
    workdir = copy_until(uninterrupted[0], 9, tmp_path / "run")
    (workdir / "metrics.jsonl").unlink()
    summary = train(settings, workdir)
    assert "lacks steps 1-9, and goes on after them" in capsys.readouterr().out
    assert summary["validation_loss"] == uninterrupted[1]["validation_loss"]


def test_other_settings_in_the_same_workdir_are_refused(settings, uninterrupted, tmp_path):
    changed = make_settings(tmp_path, **_KEEP, optimizer__learning_rate=5e-4)
    changed["data"]["source"] = settings["data"]["source"]
    changed["data"]["data_dir"] = settings["data"]["data_dir"]
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate: 0.001 -> 0.0005"):
        train(changed, uninterrupted[0])


def test_other_data_in_the_same_workdir_is_refused(settings, uninterrupted):
    corpus = pathlib.Path(settings["data"]["source"].removeprefix("text:"))
    before = corpus.read_text()
    corpus.write_text(before + "one more line\n")
    try:
        with pytest.raises(ConfigError, match="other data"):
            train(settings, uninterrupted[0])
    finally:
        corpus.write_text(before)


def test_damaged_checkpoint_is_named_and_the_one_before_used(
    settings, uninterrupted, tmp_path, capsys
):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted[0], workdir)
    newest = find_checkpoints(workdir / "checkpoints")[0]
    largest = max(
        (path for path in newest.path.rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )
    largest.write_bytes(largest.read_bytes()[:100])
    train(settings, workdir)
    output = capsys.readouterr().out
    assert f"warning: checkpoint ignored: {largest}" in output
    assert f"resuming {workdir} at step {NUM_STEPS - 1}" in output
    _assert_same_end(settings, workdir, uninterrupted[0])


def test_run_whose_checkpoints_are_all_damaged_is_not_restarted_in_silence(
    settings, uninterrupted, tmp_path
):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted[0], workdir)
    for info in find_checkpoints(workdir / "checkpoints"):
        (info.path / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"no checkpoint .* is whole"):
        train(settings, workdir)


def test_evaluation_restores_masks(settings, uninterrupted):
    workdir, summary = uninterrupted
    result = evaluate(parse_config(settings), workdir)
    assert (result["step"], result["phase"]) == (NUM_STEPS, "sparse")
    assert result["validation_loss"] == summary["validation_loss"]
    assert result["attention_density"] == summary["sparse_attention_density"] < 1


def test_run_leaves_pictures_summary_and_one_compilation_per_phase(uninterrupted):
    workdir, summary = uninterrupted
    assert_documented(workdir)
    for name in ("training.png", "attention_patterns.png"):
        assert (workdir / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads((workdir / "summary.json").read_text())["num_steps"] == NUM_STEPS
    assert summary["sparse_first_step"] == 6
    rows = read_metrics(workdir / "metrics.jsonl")
    assert [row["phase"] for row in rows if row["kind"] == "phase"] == ["dense", "sparse"]
    (switch,) = [row for row in rows if row["kind"] == "switch"]
    assert (switch["step"], switch["reason"]) == (6, "its last step is reached")
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, NUM_STEPS + 1))
    assert list((workdir / "tensorboard").iterdir())


def test_nothing_compiles_once_a_phase_has_begun(recorded):
    events = recorded[2]
    phases = [i for i, event in enumerate(events) if event.startswith("phase ")]
    assert len(phases) == 2
    before_switch = next(i for i, event in enumerate(events) if "| step   6/10 |" in event)
    assert "compiled" in events[before_switch : phases[1]]
    for begin, end in ((phases[0], before_switch), (phases[1], len(events))):
        assert "compiled" not in events[begin:end], events
