"""Checkpoints come back bit for bit, and broken ones are told from whole ones."""

import dataclasses
import functools
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax.checkpoint import save
from sparsejax.checkpoint.files import check_free_space
from sparsejax.checkpoint.save import (
    CheckpointError,
    count_bytes,
    find_checkpoints,
    read_run_metadata,
    restore,
)
from tests.checkpoint.saves import (
    assert_identical,
    fill_disk_for,
    make_abstract,
    make_state,
    open_checkpointer,
    save_steps,
)


def test_state_data_position_and_metadata_come_back_bit_for_bit(tmp_path, capfd):
    state, data_state = make_state(300), {"next_index": 2**40, "source": ["a", 0.1]}
    metadata = {"phase": "sparse", "flops": {"steps": 300}}
    with open_checkpointer(tmp_path / "new" / "folder", keep_best=1) as checkpointer:
        checkpointer.save(
            300, state, data_state, metadata=metadata, metrics={"validation_loss": float("inf")}
        )
        # Training goes on while the checkpoint is written.
        metadata["flops"]["steps"] = 301
    (info,) = find_checkpoints(tmp_path / "new" / "folder")
    assert (info.step, info.problem) == (300, None)
    assert info.metadata == {"phase": "sparse", "flops": {"steps": 300}}
    assert info.metrics == {"validation_loss": float("inf")}
    restored, restored_data_state = restore(info, make_abstract(state))
    assert_identical(restored, state)
    assert isinstance(restored.opt_state[0], optax.ScaleByAdamState)
    assert restored_data_state == data_state
    from_shapes, _ = restore(info, jax.eval_shape(lambda: state))
    assert_identical(from_shapes, state)
    assert capfd.readouterr() == ("", "")


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    bits = jnp.array([0x7FC00123, 0x7F800001, 0x80000000, 1], jnp.uint32)
    numbers = ("bool", "int8", "uint8", "int4", "int16", "uint32", "float16", "float8_e4m3fn")
    state = {name: jnp.arange(4).astype(name) for name in numbers}
    state |= {
        "float32": jax.lax.bitcast_convert_type(bits, jnp.float32),
        "bfloat16": jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16),
        "complex64": jnp.array([1 + 2j], jnp.complex64),
        "scalar": jnp.array(True),
        "keys": jax.random.split(jax.random.key(0), 3),
        "other_key": jax.random.key(1, impl="rbg"),
    }
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {}, metadata={})
    restored, _ = restore(find_checkpoints(tmp_path)[0], make_abstract(state))
    assert_identical(restored, state)


def test_buffers_may_be_donated_at_once_and_restored_ones_too(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    state = {f"w{i}": jnp.full(1 << 19, float(i)) for i in range(8)}
    abstract = make_abstract(state)
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {}, metadata={})
        state = overwrite(state)
    restored, _ = restore(find_checkpoints(tmp_path)[0], abstract)
    for i in range(8):
        assert bool((restored[f"w{i}"] == i).all())
    assert bool((overwrite(restored)["w3"] == -1).all())


def with_bias(leaf):
    return lambda tree: dataclasses.replace(tree, params={"block": tree.params["block"] | leaf})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            with_bias({"b": jax.ShapeDtypeStruct((3,), jnp.float32)}),
            r"params/block/b: bfloat16\[3\] on disk, float32\[3\] asked for",
        ),
        (
            with_bias({"w": jax.ShapeDtypeStruct((4, 3), jnp.float32)}),
            r"params/block/w: float32\[3, 4\] on disk, float32\[4, 3\] asked for",
        ),
        (
            with_bias({"extra": jax.ShapeDtypeStruct((2,), jnp.bool)}),
            r"params/block/extra: nothing on disk, bool\[2\] asked for",
        ),
        (
            lambda tree: dataclasses.replace(tree, params={}),
            r"params/block/b: bfloat16\[3\] on disk, nothing asked for; params/block/w",
        ),
        (
            lambda tree: dataclasses.replace(tree, sparsity={"block": {"w": None, "b": None}}),
            r"sparsity/block/w: bool\[3, 4\] on disk, None asked for",
        ),
        (
            lambda tree: dataclasses.replace(tree, key=jax.eval_shape(lambda: jnp.zeros(2, "u4"))),
            r"key: key<fry>\[\] on disk, uint32\[2\] asked for",
        ),
    ],
)
def test_restore_refuses_another_state(two_saves, change, message):
    info = find_checkpoints(two_saves)[0]
    with pytest.raises(ValueError, match=message):
        restore(info, change(make_abstract(make_state())))


KILLED_IN_MID_SAVE = """
import sys, jax, jax.numpy as jnp
from sparsejax.checkpoint.save import Checkpointer
with Checkpointer(sys.argv[1], keep_last=2, keep_best=0, run_metadata={}) as checkpointer:
    state = {"w": jax.random.normal(jax.random.key(0), (1 << 22,))}
    checkpointer.save(1, state, {"next_index": 1}, metadata={}, block=True)
    for step in range(2, 20):
        checkpointer.save(step, state, {"next_index": step}, metadata={})
        print("saving", flush=True)
"""


def _stop(child):
    """Stop a process, and return once it stands still."""
    child.send_signal(signal.SIGSTOP)
    event = os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert event.si_code == os.CLD_STOPPED


@pytest.mark.ci
def test_kill_in_mid_save_leaves_the_previous_checkpoint(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED_IN_MID_SAVE, tmp_path],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    with child:
        child.stdout.readline()
        # Stopped first, so that the save seen under way is the one that is killed.
        _stop(child)
        while not list(tmp_path.glob("*.tmp*")):
            child.send_signal(signal.SIGCONT)
            time.sleep(0.01)
            _stop(child)
        child.kill()
    unfinished, whole, *_ = find_checkpoints(tmp_path)
    assert "unfinished" in unfinished.problem and unfinished.path.name in unfinished.problem
    assert whole.problem is None and whole.step == unfinished.step - 1
    abstract = {"w": jax.ShapeDtypeStruct((1 << 22,), jnp.float32)}
    state, data_state = restore(whole, abstract)
    assert data_state == {"next_index": whole.step}
    assert bool((state["w"] == jax.random.normal(jax.random.key(0), (1 << 22,))).all())
    with open_checkpointer(tmp_path):
        assert not list(tmp_path.glob("*.tmp*"))
    assert all(info.problem is None for info in find_checkpoints(tmp_path))


@pytest.fixture
def full_disk():
    """Let writes beyond 100 kB fail, as they do on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    "noticed_by",
    ["wait", *(pytest.param(n, marks=pytest.mark.ci) for n in ("save", "close", "block"))],
)
def test_a_failed_background_save_is_raised_and_cleaned_up(
    tmp_path, full_disk, noticed_by, caplog, capfd
):
    small, large = {"x": jnp.ones(2)}, {"x": jax.random.normal(jax.random.key(0), (1 << 16,))}
    checkpointer = open_checkpointer(tmp_path)
    checkpointer.save(1, small, {}, metadata={}, block=True)
    with pytest.raises(CheckpointError, match=r"00000002 failed: [^\n]+$"):
        checkpointer.save(2, large, {}, metadata={}, block=noticed_by == "block")
        if noticed_by == "save":
            checkpointer.save(3, small, {}, metadata={})
        elif noticed_by == "wait":
            checkpointer.wait()
        else:
            checkpointer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001", "run.json"]
    # As by a thread of Orbax that was still writing another array.
    (tmp_path / "00000002.tmp.orbax-checkpoint-tmp" / "d").mkdir(parents=True)
    checkpointer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001", "run.json"]
    assert not caplog.records and capfd.readouterr() == ("", "")
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, small, {}, metadata={})
    assert [info.step for info in find_checkpoints(tmp_path)] == [2, 1]


@pytest.mark.parametrize(
    ("name", "error"), [("run.json", OSError), ("manifest.json", CheckpointError)]
)
def test_a_full_disk_is_named_and_older_checkpoints_stay(directory, monkeypatch, name, error):
    fill_disk_for(name, monkeypatch)
    with pytest.raises(error, match=f"No space left on device: '[^\n]*{name}'$"):
        save_steps(directory, [30])
    found = find_checkpoints(directory)
    assert [(info.step, info.problem) for info in found] == [(20, None), (10, None)]
    assert read_run_metadata(directory) == {}


def test_a_failed_save_does_not_hide_the_error_that_ended_training(tmp_path, full_disk):
    large = {"x": jax.random.normal(jax.random.key(0), (1 << 16,))}
    with (
        pytest.raises(ZeroDivisionError) as caught,
        open_checkpointer(tmp_path) as checkpointer,
    ):
        checkpointer.save(2, large, {}, metadata={})
        raise ZeroDivisionError
    assert "00000002 failed" in caught.value.__notes__[0]


def test_an_old_checkpoint_that_cannot_be_deleted_is_told_as_a_failure(directory, monkeypatch):
    fail = functools.partial(os.stat, directory / "absent")
    monkeypatch.setattr(save, "delete_checkpoint", lambda path: fail())
    message = rf"^opening {directory} failed: .*No such file or directory: '.*absent'$"
    with pytest.raises(CheckpointError, match=message), open_checkpointer(directory, keep_last=1):
        pass
    with pytest.raises(ZeroDivisionError) as caught, open_checkpointer(directory, keep_last=1):
        raise ZeroDivisionError
    assert re.search(message, caught.value.__notes__[0])
    assert [info.step for info in find_checkpoints(directory)] == [20, 10]


def test_run_metadata_is_kept_and_a_garbled_one_named(tmp_path):
    assert read_run_metadata(tmp_path / "absent") is None
    metadata = {"config": {"learning_rate": 3e-4, "widths": [1, 2]}, "python": "3.12"}
    open_checkpointer(tmp_path, run_metadata=metadata).close()
    assert read_run_metadata(tmp_path) == metadata
    os.truncate(tmp_path / "run.json", 10)
    with pytest.raises(ValueError, match="run.json must be JSON, but is garbled"):
        read_run_metadata(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_last": 0}, "keep_last=0"),
        ({"keep_best": -1}, "keep_best=-1"),
        ({"run_metadata": {"widths": (1, 2)}}, r"run_metadata\['widths'\] must be .* \(1, 2\)"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        open_checkpointer(tmp_path, **options)


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="directory=.*file must be a writable folder"):
        open_checkpointer(tmp_path / "file")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"state": {"a": {"b": np.ones(2)}}}, "state leaf a/b must be a jax.Array"),
        ({"state": {"empty": jnp.ones((0, 2))}}, "state leaf empty must be .* with elements"),
        ({"state": {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}}, "each leaf its own path"),
        ({"data_state": {"next_index": np.int64(3)}}, r"\['data_state'\]\['next_index'\]"),
        ({"metrics": {"loss": 1.0}}, r"metrics must contain 'validation_loss', got \['loss'\]"),
    ],
)
def test_what_cannot_be_stored_exactly_is_refused(tmp_path, arguments, message):
    arguments = {"state": {"a": jnp.ones(1)}, "data_state": {}} | arguments
    with (
        open_checkpointer(tmp_path, keep_best=1) as checkpointer,
        pytest.raises(ValueError, match=message),
    ):
        checkpointer.save(1, metadata={}, **arguments)
    assert find_checkpoints(tmp_path) == []


def test_free_space_is_compared_with_the_need(tmp_path):
    state = make_state()
    assert count_bytes(state) == 4 + (48 + 6) + 12 + (4 + 2 * (48 + 6)) + 8
    check_free_space(tmp_path / "not" / "yet", count_bytes(state))
    with pytest.raises(
        ValueError, match=r"not/yet must have room .* need 1,000,.* MB, .* are free"
    ):
        check_free_space(tmp_path / "not" / "yet", 10**18)
