"""Caches: built once, whole or absent, and never trusted when damaged."""

import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest

from sparsejax.data import DataConfig, make_data
from sparsejax.data.cache import cached_folder


def build_greeting(folder):
    (folder / "greeting.txt").write_text("hello")
    (folder / "more.txt").write_text("world")


def refuse_to_build(folder):
    raise AssertionError("built a second time")


@pytest.fixture
def cache(tmp_path):
    folder = tmp_path / "caches" / "greeting"
    cached_folder(folder, build_greeting)
    return folder


def test_a_sound_cache_is_not_built_again(cache):
    digest = cached_folder(cache, refuse_to_build)
    assert (cache / "more.txt").read_text() == "world"
    assert digest == cached_folder(cache.parent / "other", build_greeting)


def damage_by_cutting(folder):
    os.truncate(folder / "greeting.txt", 2)


def damage_by_flipping(folder):
    (folder / "greeting.txt").write_text("hellO")


def damage_by_deleting(folder):
    (folder / "more.txt").unlink()


def damage_the_manifest(folder):
    os.truncate(folder / "manifest.json", 10)


@pytest.mark.parametrize(
    "damage", [damage_by_cutting, damage_by_flipping, damage_by_deleting, damage_the_manifest]
)
def test_a_damaged_cache_is_reported_and_built_again(cache, damage, caplog):
    digest = cached_folder(cache, refuse_to_build)
    damage(cache)
    assert cached_folder(cache, build_greeting) == digest
    assert (cache / "greeting.txt").read_text() == "hello"
    assert [r.getMessage() for r in caplog.records if f"The cache {cache} is damaged" in r.message]


def test_a_failed_build_leaves_nothing_behind(tmp_path):
    def fail(folder):
        build_greeting(folder)
        raise ValueError("no more data")

    with pytest.raises(ValueError, match="no more data"):
        cached_folder(tmp_path / "cache", fail)
    assert [path.name for path in tmp_path.iterdir()] == [".cache.lock"]


def build_for_ever(folder):
    (folder / "greeting.txt").write_text("hel")
    time.sleep(60)


@pytest.mark.ci
def test_a_killed_build_is_neither_used_nor_kept(tmp_path):
    folder = tmp_path / "cache"
    process = multiprocessing.get_context("spawn").Process(
        target=cached_folder, args=(folder, build_for_ever)
    )
    process.start()
    while not list(tmp_path.glob("*/greeting.txt")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not folder.exists()
    cached_folder(folder, build_greeting)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".cache.lock", "cache"]


def test_one_of_several_builders_builds_and_the_others_wait(tmp_path):
    builds, digests = [], []

    def build(folder):
        builds.append(folder)
        time.sleep(0.1)
        build_greeting(folder)

    threads = [
        threading.Thread(target=lambda: digests.append(cached_folder(tmp_path / "cache", build)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1 and len(digests) == 4 and len(set(digests)) == 1


def test_what_cannot_be_written_or_read_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="data_dir: cannot write to .*file.*; expected a folder"):
        cached_folder(tmp_path / "file" / "cache", build_greeting)

    def fill_the_disk(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match="cannot build the cache .*: .*No space left on device"):
        cached_folder(tmp_path / "cache", fill_the_disk)


def test_a_damaged_token_file_does_not_change_the_batches(tmp_path, caplog):
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes Jack a dull boy.\n" * 50)
    config = DataConfig(
        source=f"text:{text}",
        data_dir=str(tmp_path / "data"),
        sequence_length=15,
        batch_size=4,
        seed=0,
        validation_fraction=0.2,
    )
    data = make_data(config)
    first = next(data.train)
    (tokens,) = (tmp_path / "data").glob("tokens/text-train-*/tokens.bin")
    os.truncate(tokens, 500)
    again = make_data(config)
    assert "damaged" in caplog.text
    assert again.fingerprint == data.fingerprint
    np.testing.assert_equal(next(again.train), first)
