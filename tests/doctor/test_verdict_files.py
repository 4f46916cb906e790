"""Files of verdicts: written by several at a time, read by all, and never half."""

import concurrent.futures
import dataclasses
import json
import pathlib

import pytest

from pallas_kernels import hopper, source_hash
from pallas_kernels.backends import find_backend
from pallas_kernels.machine import Gpu, find_gpu
from pallas_kernels.tables import TABLES
from pallas_kernels.verdict_files import (
    cache_folder,
    file_name,
    read_processors,
    read_verdicts,
    write_verdicts,
)
from pallas_kernels.verdicts import KernelKey, Timing, Verdict
from tests.doctor.gpus import install_nvidia_smi


def _verdict(wrong="", source="0123", sizes=(8, 64, 64), timings=()):
    options = (("causal", True), ("dtype", "bfloat16"), ("head_dim", 64))
    key = KernelKey("block_sparse_attention", "mosaic_sm90", source, "forward", "2 parts", options)
    return Verdict(key=key, sizes=sizes, wrong=wrong, timings=timings)


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "folder" / "verdicts.json"
    assert read_verdicts(path) == [] and read_processors(path) is None
    right = _verdict(timings=(Timing((8, 64, 64), 0.1, {"xla": 2.0, "mosaic_sm90": 1.0}),))
    wrong = _verdict(source="4567", wrong="y off by 0.3 (much)")
    refused = dataclasses.replace(_verdict(source="89"), refused="H=256")
    write_verdicts(path, [wrong, refused], processors=132)
    write_verdicts(path, [right])
    assert read_verdicts(path) == [wrong, refused, right]
    assert read_processors(path) == 132


def test_a_wrong_kernel_stays_wrong_until_it_is_right_on_the_same_call(tmp_path):
    path, other = tmp_path / "v.json", (8, 128, 64)
    write_verdicts(path, [_verdict(wrong="hang"), _verdict(sizes=other)])
    assert read_verdicts(path) == [_verdict(wrong="hang")]
    write_verdicts(path, [_verdict()])
    assert read_verdicts(path) == [_verdict()]
    write_verdicts(path, [_verdict(wrong="crash", sizes=other)])
    assert read_verdicts(path) == [_verdict(wrong="crash", sizes=other)]


def test_times_of_other_sizes_are_kept_and_newer_ones_of_the_same_replace_them(tmp_path):
    path = tmp_path / "v.json"
    for size, seconds in ((64, 2.0), (128, 3.0), (64, 1.0)):
        timing = Timing((8, size, size), 0.1, {"mosaic_sm90": seconds})
        write_verdicts(path, [_verdict(sizes=timing.sizes, timings=(timing,))])
    (verdict,) = read_verdicts(path)
    assert {t.sizes[1]: t.seconds["mosaic_sm90"] for t in verdict.timings} == {128: 3.0, 64: 1.0}


GARBLED = {
    "no JSON": "{",
    "no object": "[]",
    "nothing in it": "{}",
    "lists without end": "[" * 200_000,
    "objects without end": '{"verdicts":' * 100_000,
    "processors that are none": '{"processors": true, "verdicts": []}',
    "processors beyond all numbers": '{"processors": 1e999, "verdicts": []}',
    "not UTF-8": b"\xff\xfe",
    "sizes that are none": {"sizes": [1e999]},
    "sizes beyond all devices": {"sizes": [10**400]},
    "options that are none": {"options": {"causal": [1]}},
    "a time that is no number": {
        "timings": [{"sizes": [1], "density": 0.1, "seconds": {"xla": float("nan")}}]
    },
    "a verdict that is none": {"verdict": "perhaps"},
    "a source that is none": {"source": 3},
    "a time that is none": {"timings": [{"sizes": [1], "density": 0.1, "seconds": {"xla": "a"}}]},
}


@pytest.mark.parametrize("change", GARBLED.values(), ids=GARBLED)
def test_a_garbled_file_is_refused_by_name_and_not_overwritten(tmp_path, change):
    path = tmp_path / "verdicts.json"
    write_verdicts(path, [_verdict()])
    text = change
    if isinstance(change, dict):
        content = json.loads(path.read_text())
        content["verdicts"][0] |= change
        text = json.dumps(content)
    text = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(text)
    message = rf"^{path} must be a readable file of verdicts, got \w+: .*; delete it and run"
    with pytest.raises(ValueError, match=message):
        read_verdicts(path)
    with pytest.raises(ValueError, match=message):
        write_verdicts(path, [_verdict()])
    assert path.read_bytes() == text


def test_writers_at_the_same_time_lose_nothing(tmp_path):
    path, count = tmp_path / "verdicts.json", 4

    # Threads are writers like processes: each opens the lock for itself.
    def write(writer):
        for i in range(20):
            write_verdicts(path, [_verdict(source=f"{writer} {i}")])

    with concurrent.futures.ThreadPoolExecutor(count) as executor:
        list(executor.map(write, range(count)))
    sources = {verdict.key.source for verdict in read_verdicts(path)}
    assert sources == {f"{writer} {i}" for writer in range(count) for i in range(20)}


def test_files_are_told_apart_by_device_and_driver(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(cache_folder()) == "/somewhere/sparsejax/verdicts"
    names = {
        file_name(kind, driver)
        for kind in ("NVIDIA H200", "NVIDIA GeForce RTX 4090")
        for driver in ("580.65.06", "580.82.07")
    }
    assert len(names) == 4 and all("/" not in name for name in names)


def test_the_gpu_is_the_first_that_programs_may_use(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_gpu() is None
    lines = ("0, GPU-aa, NVIDIA A100, 580.1, 8.0", "1, GPU-bb, NVIDIA H200, 580.1, 9.0")
    install_nvidia_smi(tmp_path, monkeypatch, lines)
    assert find_gpu() == Gpu("NVIDIA A100", "580.1", "8.0", 2)
    for visible, kind in (("1", "NVIDIA H200"), ("GPU-bb,0", "NVIDIA H200"), ("", None)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        found = find_gpu()
        assert (found and found.kind) == kind
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    install_nvidia_smi(tmp_path, monkeypatch, ["NVIDIA-SMI has failed"], code=9)
    assert find_gpu() is None


@pytest.mark.parametrize(
    "old, new, differs",
    [
        ("x + 1", "x + 2", True),
        ("# why", "# other", False),
        ('"""Add."""', '"""Add one."""', False),
        ("    return", "\n\n    return", False),
        ("y = 1", "y = 2", True),  # in what is imported
    ],
)
def test_a_hash_is_of_code_and_of_what_it_imports(tmp_path, monkeypatch, old, new, differs):
    files = {
        "pallas_kernels.outer": (
            "from pallas_kernels.inner import y\n\n\n"
            'def f(x):\n    """Add."""\n    # why\n    return x + 1 + y\n'
        ),
        "pallas_kernels.inner": "y = 1\n",
    }
    monkeypatch.setattr(
        source_hash, "_find_file", lambda name: tmp_path / name if name in files else None
    )

    def hash_files(change):
        for name, text in files.items():
            (tmp_path / name).write_text(change(text))
        return source_hash._hash_closure.__wrapped__("pallas_kernels.outer")

    before = hash_files(lambda text: text)
    assert (hash_files(lambda text: text.replace(old, new)) != before) == differs


@pytest.mark.parametrize(
    "op", ["block_sparse_attention", "block_sparse_matmul", "mean_attention_map", "nm_matmul"]
)
@pytest.mark.parametrize("module", ["budget", "launch", "layouts", "ring", "shared_memory"])
def test_the_hash_of_a_hopper_kernel_is_of_what_it_shares(op, module, monkeypatch):
    run = find_backend(op, TABLES[op], "mosaic_sm90").run
    changed, dump = pathlib.Path(hopper.__file__).with_name(f"{module}.py"), source_hash._dump
    before = source_hash.hash_source(run)
    monkeypatch.setattr(source_hash, "_dump", lambda path: dump(path) + "x" * (path == changed))
    assert changed.exists() and source_hash._hash_closure.__wrapped__(run.__module__) != before
