"""Checkpoints that two processes write together, and that other numbers of processes read."""

import jax
import pytest

from sparsejax.checkpoint.files import find_checkpoints, read_manifest
from tests.processes.launch import Launched
from tests.processes.worker import (
    describe,
    make_state,
    open_checkpoints,
    restore_newest,
)

pytestmark = pytest.mark.ci


def launch(folder, *arguments):
    said = folder / "said"
    said.mkdir()
    return Launched(said, [*map(str, arguments)], program=("-m", "tests.processes.worker"))


def test_every_bit_goes_from_one_process_to_two_and_from_two_to_one(tmp_path):
    state = jax.jit(make_state)()
    with open_checkpoints(tmp_path / "one") as checkpointer:
        checkpointer.save(3, state, {"next_index": 3}, metadata={})
    run = launch(tmp_path, "save", tmp_path / "two", tmp_path / "one")
    assert run.wait() == [0, 0], run.explain()
    for index in range(2):
        lines = run.read_own(index)
        assert lines == [describe(state)]
    assert describe(restore_newest(tmp_path / "two")) == describe(state)
    found = find_checkpoints(tmp_path / "two")
    assert [(info.step, info.problem) for info in found] == [(3, None), (2, None)]
    files = read_manifest(found[0].path)["files"]
    on_disk = {str(x.relative_to(found[0].path)) for x in found[0].path.rglob("*") if x.is_file()}
    assert set(files) == on_disk - {"manifest.json"}
    assert any("ocdbt.process_1" in name for name in files)


def test_a_save_that_fails_on_one_process_ends_all(tmp_path):
    run = launch(tmp_path, "fail", tmp_path / "two")
    assert run.wait() == [1, 1], run.explain()
    (alone,), (told,) = run.read_errors(1), run.read_errors(0)
    assert alone.startswith("error: saving ") and "No space left on device" in alone
    assert told == f"error: process 1 has ended: {alone.removeprefix('error: ')}"
    assert [info.problem is None for info in find_checkpoints(tmp_path / "two")] == [False]
