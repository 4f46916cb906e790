"""Caches: built once, whole or absent, and never trusted when damaged."""

import multiprocessing
import os
import signal
import subprocess
import sys
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


MANIFESTS = {
    "list": b"[1, 2]",
    "null": b"null",
    "nothing": b"{}",
    "no entry": b'{"greeting.txt": 3}',
    "no size": b'{"greeting.txt": {}}',
    "outside": b'{"../outside": {"bytes": 4, "sha256": ""}}',
    "a device": b'{"/dev/zero": {"bytes": 0, "sha256": ""}}',
    "byte 0": b'{"a\\u0000b": {"bytes": 4, "sha256": ""}}',
    "not utf-8": b"\xff\xfe",
    "utf-16": "{}".encode("utf-16"),
    "lists without end": b"[" * 200_000,
    "objects without end": b'{"a":' * 200_000,
    "an absurd number": b'{"greeting.txt": {"bytes": 1e999, "sha256": ""}}',
    "a long number": b'{"greeting.txt": ' + b"9" * 5000 + b"}",
    "twice": b'{"greeting.txt": {}, "greeting.txt": {}}',
    "huge": b" " * (5 << 20),
}


def damage_by_link(folder):
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to("/dev/zero")


@pytest.mark.parametrize(
    "damage",
    [
        damage_by_cutting,
        damage_by_flipping,
        damage_by_deleting,
        damage_the_manifest,
        damage_by_link,
        *MANIFESTS.values(),
    ],
    ids=["cut", "flipped", "deleted", "manifest", "link", *MANIFESTS],
)
def test_a_damaged_cache_is_reported_and_built_again(cache, damage, caplog):
    digest = cached_folder(cache, refuse_to_build)
    if isinstance(damage, bytes):
        (cache / "manifest.json").write_bytes(damage)
    else:
        damage(cache)
    assert cached_folder(cache, build_greeting) == digest
    assert (cache / "greeting.txt").read_text() == "hello"
    assert [r.getMessage() for r in caplog.records if f"The cache {cache} is damaged" in r.message]


def test_building_again_touches_nothing_else(cache, tmp_path):
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    (cache / "notes.txt").write_text("mine")
    (cache / "folder").mkdir()
    for name in ("greeting.txt", "manifest.json", "manifest.json.new"):
        (cache / name).unlink(missing_ok=True)
        (cache / name).symlink_to(victim)
    lock = cache.parent / f".{cache.name}.lock"
    cached_folder(cache, build_greeting)
    assert victim.read_text() == "precious" and (cache / "notes.txt").read_text() == "mine"
    assert not (cache / "greeting.txt").is_symlink() and (cache / "folder").is_dir()
    lock.unlink()
    lock.symlink_to(victim)
    damage_by_cutting(cache)
    with pytest.raises(ValueError, match="data_dir: cannot write to .*symbolic links"):
        cached_folder(cache, build_greeting)
    lock.unlink()
    moved = cache.rename(tmp_path / "moved")
    cache.symlink_to(moved)
    with pytest.raises(ValueError, match=r"greeting must be a folder, got a link; remove it"):
        cached_folder(cache, build_greeting)
    assert victim.read_text() == "precious" and (moved / "notes.txt").read_text() == "mine"


def test_a_failed_build_leaves_nothing_behind(tmp_path):
    def fail(folder):
        build_greeting(folder)
        raise ValueError("no more data")

    with pytest.raises(ValueError, match="no more data"):
        cached_folder(tmp_path / "cache", fail)
    assert [path.name for path in tmp_path.iterdir()] == [".cache.lock"]


def build_for_ever(folder):
    (folder / "greeting.txt").write_text("hel")
    while True:
        signal.pause()


@pytest.mark.ci
def test_a_killed_build_is_neither_used_nor_kept(tmp_path):
    folder = tmp_path / "cache"
    process = multiprocessing.get_context("spawn").Process(
        target=cached_folder, args=(folder, build_for_ever)
    )
    process.start()
    while not list(tmp_path.glob("*/greeting.txt")):
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not folder.exists()
    cached_folder(folder, build_greeting)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".cache.lock", "cache"]


def test_one_of_several_builders_builds_and_the_others_wait(tmp_path):
    builds, digests = [], []
    all_ask = threading.Barrier(4)

    def ask():
        all_ask.wait()
        digests.append(cached_folder(tmp_path / "cache", build))

    def build(folder):
        builds.append(folder)
        build_greeting(folder)

    threads = [threading.Thread(target=ask) for _ in range(4)]
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


# No larger file than this can be written, as if the disk were full.
FULL_DISK = """
import resource, sys
from sparsejax.data import DataConfig, make_data
limit, source, data_dir, tokenizer = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
settings = {"listops_examples": 480} if source == "listops:short" else {"tokenizer": tokenizer}
try:
    make_data(DataConfig(source=source, data_dir=data_dir, sequence_length=256, **settings))
except ValueError as error:
    sys.exit(str(error))
"""


@pytest.mark.ci
@pytest.mark.parametrize(
    ("source", "tokenizer", "limit", "kind"),
    [
        ("text:", "bytes", 1_000, "tokens"),
        ("text:", "bpe:258", 1_000, "tokenizers"),
        ("text:", "bpe:258", 30_000, "tokens"),
        ("listops:short", "", 2_000, "list_ops"),
    ],
)
def test_a_full_disk_is_told_in_one_line_and_leaves_no_cache(
    source, tokenizer, limit, kind, tmp_path
):
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes Jack a dull boy.\n" * 5_000)
    source = f"text:{text}" if source == "text:" else source
    command = [sys.executable, "-c", FULL_DISK, str(limit), source, str(tmp_path), tokenizer]
    found = subprocess.run(command, capture_output=True, text=True)
    # Before it, lines of progress where a machine is slow.
    *_, line = found.stderr.splitlines()
    assert found.returncode == 1 and "Traceback" not in found.stderr
    assert line.startswith(f"data_dir: cannot build the cache {tmp_path}/{kind}/"), line
    assert "File too large" in line
    assert not list((tmp_path / kind).rglob("manifest.json"))
