"""Which checkpoints are whole, which are kept, and what is left alone."""

import os
import shutil

import jax.numpy as jnp
import pytest

from sparsejax.checkpoint.files import (
    find_leftovers,
    read_manifest,
    seal_manifest,
)
from sparsejax.checkpoint.save import find_checkpoints, restore
from sparsejax.checkpoint.workdir import find_last_good
from tests.checkpoint.saves import (
    assert_identical,
    flip_a_bit,
    largest_file,
    make_abstract,
    make_state,
    open_checkpointer,
    save_steps,
)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: os.truncate(largest_file(folder / "state"), 100), "has 100 bytes"),
        (lambda folder: largest_file(folder / "state").unlink(), "is missing"),
        (lambda folder: flip_a_bit(largest_file(folder / "state")), "checksum differs"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: os.truncate(folder / "manifest.json", 50), "manifest.json is garbled"),
        (lambda folder: flip_a_bit(folder / "manifest.json"), "manifest.json is garbled"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json is garbled"),
    ],
)
def test_damage_is_named_and_the_previous_checkpoint_stays_usable(directory, damage, message):
    damage(directory / "00000020")
    broken, whole = find_checkpoints(directory)
    assert (broken.step, whole.step) == (20, 10)
    assert message in broken.problem and str(directory / "00000020") in broken.problem
    with pytest.raises(ValueError, match="00000020"):
        restore(broken, make_abstract(make_state()))
    assert_identical(restore(whole, make_abstract(make_state()))[0], make_state(10))


def test_what_a_kill_left_to_delete_goes_when_the_folder_is_opened(tmp_path):
    save_steps(tmp_path, [10, 20, 30], keep_last=3)
    with open_checkpointer(tmp_path, keep_last=2):
        pass
    assert [info.step for info in find_checkpoints(tmp_path)] == [30, 20]


def test_a_broken_checkpoint_is_replaced_when_its_step_is_saved_again(directory):
    os.truncate(largest_file(directory / "00000020" / "state"), 100)
    save_steps(directory, [20])
    newest, previous = find_checkpoints(directory)
    assert (newest.step, newest.problem) == (20, None)
    assert (previous.step, previous.problem) == (10, None)
    assert restore(newest, make_abstract(make_state()))[1] == {"next_index": 20}


def test_last_and_best_are_kept_across_restarts(tmp_path):
    losses = {1: 0.5, 2: 0.1, 3: 0.2, 4: float("nan"), 5: 0.4, 6: None, 7: 0.9}
    for steps in ((1, 2, 3, 4), (5, 6, 7)):
        with open_checkpointer(tmp_path, keep_last=2, keep_best=2) as checkpointer:
            for step in steps:
                metrics = None if losses[step] is None else {"validation_loss": losses[step]}
                checkpointer.save(step, {"x": jnp.ones(2)}, {}, metadata={}, metrics=metrics)
    assert [info.step for info in find_checkpoints(tmp_path)] == [7, 6, 3, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("00000002", "00000003", "00000006", "00000007"),
        "run.json",
    ]


@pytest.mark.parametrize(
    "damage",
    [lambda file: os.truncate(file, 100), lambda file: flip_a_bit(file)],
    ids=["truncated", "flipped"],
)
def test_broken_checkpoints_do_not_count_among_the_last(directory, damage):
    damage(largest_file(directory / "00000020" / "state"))
    save_steps(directory, [30])
    assert [info.step for info in find_checkpoints(directory)] == [30, 10]


_GOOD, _BAD, _FOR_ITS_LOSS = {}, {"good": False}, {"periodic": False}


@pytest.mark.parametrize(
    ("saves", "expected"),
    [
        # A stop amid skipped steps: what is bad stays until the next save, and pushes nothing out.
        ([(1, 0.5, _GOOD), (2, 0.6, _GOOD), (3, 0.7, _GOOD), (4, 0.1, _BAD)], [4, 3, 2, 1]),
        ([(1, 0.5, _GOOD), (2, 0.6, _BAD), (3, 0.7, _BAD), (4, 0.8, _GOOD)], [4, 1]),
        # Validations between the periodic saves.
        ([(1, 0.1, _FOR_ITS_LOSS), *((i, None, _GOOD) for i in (2, 4, 6))], [6, 4, 1]),
        ([(2, None, _GOOD), (4, None, _GOOD), (5, 0.5, _FOR_ITS_LOSS)], [5, 4, 2]),
        ([(2, None, _GOOD), (3, 0.5, _FOR_ITS_LOSS), (4, 0.4, _GOOD), (6, None, _GOOD)], [6, 4]),
    ],
)
def test_only_good_ones_count_and_only_periodic_ones_are_last(tmp_path, saves, expected):
    with open_checkpointer(tmp_path, keep_last=2, keep_best=1) as checkpointer:
        for step, loss, kind in saves:
            metrics = None if loss is None else {"validation_loss": loss}
            checkpointer.save(step, {"x": jnp.ones(2)}, {}, metadata={}, metrics=metrics, **kind)
    found = find_checkpoints(tmp_path)
    assert [info.step for info in found] == expected
    kinds = {step: kind for step, _, kind in saves}
    assert all(
        {"good": x.good, "periodic": x.periodic}.items() >= kinds[x.step].items() for x in found
    )
    newest_good = next(info for info in found if info.good)
    assert find_last_good(tmp_path, before_step=99) == newest_good
    assert find_last_good(tmp_path, before_step=newest_good.step) in found[1:]


def test_a_loss_ranks_if_it_is_better_than_one_of_the_best(tmp_path):
    def rank(loss):
        return checkpointer.ranks_among_best({"validation_loss": loss})

    for restart in range(2):
        with open_checkpointer(tmp_path, keep_best=2) as checkpointer:
            if not restart:
                assert rank(9.0) and not rank(float("nan"))
                for step, loss in ((1, 0.5), (2, 0.3), (3, 0.4)):
                    metrics = {"validation_loss": loss}
                    checkpointer.save(step, {"x": jnp.ones(2)}, {}, metadata={}, metrics=metrics)
            assert rank(0.39) and not rank(0.4) and not rank(float("inf"))
    with open_checkpointer(tmp_path, keep_best=0) as checkpointer:
        assert not rank(0.1)


def test_nothing_is_deleted_or_in_the_way_that_no_save_has_made(directory):
    precious = [
        *("2/notes", "00000005/notes", "backup.deleted/notes", "00000007.deleted/notes"),
        *("00000030.tmp/notes", "00000010.deleted/notes", "3/_CHECKPOINT_METADATA"),
    ]
    for name in precious:
        (directory / name).parent.mkdir()
        (directory / name).write_text(name)
    files = ["5", "00000006", "00000040", "00000040-1.tmp", "00000008.tmp"]
    for name in files:
        (directory / name).write_text(name)
    links = ["00000009", "00000011.tmp", "00000012.deleted"]
    for name in links:
        (directory / name).symlink_to(directory / "00000010", target_is_directory=True)
    save_steps(directory, [30, 40], keep_last=1)
    for name in (*precious, *files):
        assert (directory / name).read_text() == name
    assert all((directory / name).is_symlink() for name in links)
    found = find_checkpoints(directory)
    assert [i.path.name for i in found if i.problem is None] == ["00000040-2"]


def test_what_a_failed_save_has_left_keeps_its_mark_to_the_last(directory, monkeypatch):
    left = directory / "00000030.tmp"

    def stop(folder, **_):
        for file in folder.glob("_*"):
            file.unlink()
        raise OSError("in mid-deletion")

    with open_checkpointer(directory) as checkpointer:
        checkpointer.wait()
        (left / "state").mkdir(parents=True)
        (left / "_CHECKPOINT_METADATA").touch()
        monkeypatch.setattr(shutil, "rmtree", stop)
    assert find_leftovers(directory) == [left]
    assert (left / "_CHECKPOINT_METADATA").exists()


def test_manifests_of_other_versions_are_refused_in_one_line(directory):
    folder = directory / "00000020"
    content = read_manifest(folder)
    del content["good"]
    (folder / "manifest.json").write_text(seal_manifest(content))
    for text in ((folder / "manifest.json").read_text(), "[" * 200_000):
        (folder / "manifest.json").write_text(text)
        problem = find_checkpoints(directory)[0].problem
        assert "manifest.json is garbled" in problem and "\n" not in problem
