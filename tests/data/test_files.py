"""IDX images, AAN pairs, the settings of every source, and the command that prepares them."""

import gzip
import os
import struct
import tracemalloc

import numpy as np
import pytest

from sparsejax.data import DataConfig, describe_data, make_data
from sparsejax.data.prepare import main
from sparsejax.data.sources.idx import read_idx

SETTINGS = {
    "source": "stdlib",
    "data_dir": "data",
    "sequence_length": 4,
    "batch_size": 2,
    "seed": 0,
}


def write_idx(path, array):
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    contents = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(contents) if path.suffix == ".gz" else contents)


@pytest.fixture
def images(tmp_path):
    """Return the pixels by label; half of the files are compressed."""
    rng = np.random.default_rng(0)
    pixels = {"train": rng.integers(0, 256, (6, 2, 3)), "t10k": rng.integers(0, 256, (3, 2, 3))}
    (tmp_path / "idx").mkdir()
    for name, values in pixels.items():
        suffix = ".gz" if name == "train" else ""
        write_idx(tmp_path / "idx" / f"{name}-images-idx3-ubyte{suffix}", values)
        write_idx(tmp_path / "idx" / f"{name}-labels-idx1-ubyte", np.arange(len(values)))
    return pixels


def make_config(tmp_path, kind, **settings):
    config = {"source": f"{kind}:{tmp_path / kind}", "data_dir": str(tmp_path / "data")}
    return DataConfig(**{"batch_size": 3, "seed": 0} | config | settings)


def make_files(tmp_path, kind, **settings):
    return make_data(make_config(tmp_path, kind, **settings))


def test_idx_images_become_rows_of_pixels(images, tmp_path):
    data = make_files(tmp_path, "idx", sequence_length=8)
    spec = describe_data(make_config(tmp_path, "idx", sequence_length=8))
    assert data.spec[:3] == spec[:3] == ("classification", 257, 6)
    batches = {"train": [next(data.train), next(data.train)], "t10k": list(data.validation(None))}
    for name, split in batches.items():
        rows = {
            int(label): pixels[mask] - 1
            for batch in split
            for label, pixels, mask in zip(
                batch["labels"], batch["inputs"], batch["mask"], strict=True
            )
        }
        assert set(rows) == set(range(len(images[name])))
        for label, row in rows.items():
            np.testing.assert_array_equal(row, images[name][label].reshape(-1))


def test_broken_idx_files_are_refused(images, tmp_path):
    folder = tmp_path / "idx"
    compressed = folder / "train-images-idx3-ubyte.gz"
    contents = compressed.read_bytes()
    compressed.write_bytes(contents[:-12])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz cannot be read"):
        make_files(tmp_path, "idx", sequence_length=6)
    compressed.write_bytes(contents)
    labels = folder / "train-labels-idx1-ubyte"
    write_idx(labels, np.arange(5))
    with pytest.raises(ValueError, match=r"has 6 images; expected 5, one for each label"):
        make_files(tmp_path, "idx", sequence_length=6)
    labels.write_bytes(labels.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"labels-idx1-ubyte holds 4 values; expected 5"):
        make_files(tmp_path, "idx", sequence_length=6)
    labels.write_text("not an IDX file")
    with pytest.raises(ValueError, match=r"begins with '6e6f7420'; expected the IDX header"):
        make_files(tmp_path, "idx", sequence_length=6)
    (folder / "train-labels-copy").touch()
    with pytest.raises(ValueError, match=r"found \['train-labels-copy', .*\]; expected one file"):
        make_files(tmp_path, "idx", sequence_length=6)
    with pytest.raises(ValueError, match="source='idx:/nowhere': no such folder"):
        make_files(tmp_path, "idx", source="idx:/nowhere", sequence_length=6)


def announce(*shape):
    return bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape)


ABSURD_IDX = {
    "one axis of nothing": (announce(0), "announces the shape .0,.; expected 1 to"),
    "four billion labels": (announce(2**32 - 1), "announces the shape .4294967295,.; expected 1"),
    "labels that are not there": (announce(2**31 - 1) + b"12", "holds 2 values; expected 21474836"),
    "a bomb": (announce(6) + bytes(1 << 26), "holds more than 6 values; expected so many for"),
    "a header cut off": (announce(6)[:7], "ends after 7 bytes; expected an IDX header of 8$"),
    "nothing": (b"", "begins with ''; expected the IDX header"),
}


@pytest.mark.parametrize("case", ABSURD_IDX)
def test_absurd_idx_files_are_refused_in_little_memory(case, images, tmp_path):
    contents, message = ABSURD_IDX[case]
    labels = tmp_path / "idx" / "train-labels-idx1-ubyte"
    labels.unlink()
    labels.with_suffix(".gz").write_bytes(gzip.compress(contents, 1))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            describe_data(make_config(tmp_path, "idx"))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_absurd_images_are_refused(images, tmp_path):
    path = tmp_path / "idx" / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(announce(6, 65_535, 65_535)))
    for settings in ({}, {"patch_size": 1}):
        with pytest.raises(ValueError, match=r"shape \(6, 65535, 65535\); expected .* 67,108,864"):
            make_files(tmp_path, "idx", **settings)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz must be a file"):
        make_files(tmp_path, "idx")


def test_idx_files_are_read_block_by_block(tmp_path):
    labels = np.arange(3 << 20, dtype=np.uint8)
    write_idx(tmp_path / "labels", labels)
    blocks = list(read_idx(tmp_path / "labels", 1))
    assert len(blocks) == 3
    np.testing.assert_array_equal(np.concatenate(blocks), labels)


@pytest.mark.parametrize("split", ["**", "/etc", "[a-z]", "*"])
def test_names_of_splits_are_no_patterns(split, images, tmp_path):
    with pytest.raises(ValueError, match=r"found \[\]; expected one file whose name begins with"):
        make_files(tmp_path, "idx", train_split=split)


@pytest.mark.parametrize(
    "kind", ["text", "idx", "aan", "pairs", "jsonl", "parquet", "hf", "bin", "images"]
)
def test_what_the_system_cannot_open_is_refused(kind, tmp_path):
    settings = {
        "source": f"{kind}:{'a' * 5000}",
        "tokenizer": "ids:9" if kind == "bin" else "bytes",
    }
    with pytest.raises(ValueError, match="source='.*a' cannot be read: File name too long"):
        make_files(tmp_path, kind, **settings)


@pytest.fixture
def pairs(tmp_path):
    (tmp_path / "aan").mkdir()
    for split, count in (("train", 5), ("eval", 4)):
        lines = [f"{i % 2}.0\ta{i}\tb{i}\t{'x' * i}\tyes{i}\n" for i in range(count)]
        (tmp_path / "aan" / f"new_aan_pairs.{split}.tsv").write_text("".join(lines))
    return tmp_path / "aan" / "new_aan_pairs.train.tsv"


def test_pairs_of_documents_come_with_one_label(pairs, tmp_path):
    data = make_files(tmp_path, "aan", sequence_length=6, batch_size=5)
    spec = describe_data(make_config(tmp_path, "aan", sequence_length=6))
    assert data.spec[:3] == spec[:3] == ("matching", 257, 2)
    batch = next(data.train)
    assert batch["inputs"].shape == batch["mask"].shape == (5, 2, 6)
    found = {
        tuple(bytes((ids[mask] - 1).tolist()) for ids, mask in zip(*pair[:2], strict=True)): pair[2]
        for pair in zip(batch["inputs"], batch["mask"], batch["labels"], strict=True)
    }
    assert found == {(b"x" * i, b"yes%d" % i): i % 2 for i in range(5)}
    (last,) = list(data.validation(None))
    assert last["loss_weights"].tolist() == [1, 1, 1, 1, 0]


def test_broken_pairs_are_refused_by_line(pairs, tmp_path):
    lines = pairs.read_text().splitlines(keepends=True)
    pairs.write_text("".join([*lines[:2], "1.0\tonly three\tfields\n"]))
    with pytest.raises(ValueError, match=r"train\.tsv, line 3 has 3 fields; expected 5: label"):
        make_files(tmp_path, "aan", sequence_length=6)
    pairs.write_text("".join([lines[0], lines[1].replace("1.0", "maybe")]))
    with pytest.raises(ValueError, match=r"line 2 has the label b'maybe'; expected 0 or 1"):
        make_files(tmp_path, "aan", sequence_length=6)
    pairs.write_bytes(b"\0" * (20 << 20))
    with pytest.raises(ValueError, match=r"train\.tsv, line 1 is longer than 16,777,216 bytes"):
        make_files(tmp_path, "aan", sequence_length=6)
    pairs.write_text("\ufeff" + "".join(lines))
    assert make_files(tmp_path, "aan", sequence_length=6).fingerprint["train_examples"] == 5
    pairs.unlink()
    with pytest.raises(ValueError, match=r"aan': new_aan_pairs\.train\.tsv is missing"):
        make_files(tmp_path, "aan", sequence_length=6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"source": "mnist"},
            "source='mnist': expected one of stdlib, listops, listops:short, pathf",
        ),
        ({"source": "listops:long"}, "source='listops:long': expected one of"),
        ({"source": "tfds:"}, "source='tfds:': expected one of"),
        ({"data_dir": ""}, "data_dir='': expected the path of a folder"),
        ({"tokenizer": "words"}, r"tokenizer='words': expected 'bytes', 'bpe:N'"),
        ({"tokenizer": "bpe:"}, "tokenizer='bpe:': expected"),
        ({"tokenizer": "bpe:256"}, "tokenizer='bpe:256': expected between 257"),
        ({"sequence_length": 0}, r"sequence_length=0: expected an integer in \[1, 2147483647\]"),
        ({"sequence_length": 64.0}, r"sequence_length=64\.0: expected int"),
        ({"batch_size": -1}, r"batch_size=-1: expected an integer in \[1, 2147483647\]"),
        ({"seed": 2**32}, r"seed=4294967296: expected an integer in \[0, 4294967295\]"),
        ({"num_reading_threads": 2}, r"num_reading_threads=2: expected an integer in \[0, 1\]"),
        ({"validation_fraction": 1.0}, r"validation_fraction=1\.0: expected a number in \(0, 1\)"),
        (
            {"listops_examples": 10},
            r"listops_examples=10: expected an integer in \[48, 2147483647\]",
        ),
        (
            {"pathfinder_examples": 7},
            r"pathfinder_examples=7: expected an integer in \[8, 2147483647\]",
        ),
        ({"image_size": -1}, r"image_size=-1: expected an integer in \[0, 8192\]"),
        (
            {"sequence_length": 2**63},
            r"sequence_length=9223372036854775808: expected an integer in",
        ),
        ({"batch_size": 2**63}, r"batch_size=9223372036854775808: expected an integer in"),
        ({"batch_size": 2**30}, "batch_size=1073741824: expected at most 2147483647 positions in"),
        ({"listops_examples": 2**31}, "listops_examples=2147483648: expected an integer in"),
        ({"pathfinder_examples": 10**30}, "pathfinder_examples=10*: expected an integer in"),
        ({"patch_size": 2**31}, r"patch_size=2147483648: expected an integer in \[0, 8192\]"),
        ({"image_size": 8193}, r"image_size=8193: expected an integer in \[0, 8192\]"),
        ({"image_channels": True}, "image_channels=True: expected int"),
        ({"truncate": "no"}, "truncate='no': expected bool"),
        ({"seed": True}, "seed=True: expected int"),
        ({"source": None}, "source=None: expected str"),
        (
            {"data_dir": "~nobody_at_all/x"},
            "data_dir='~nobody_at_all/x': expected ~ or the name of",
        ),
        ({"data_dir": "a\0b"}, r"data_dir='a\\x00b': expected text without the byte 0"),
        ({"validation_fraction": float("nan")}, r"validation_fraction=nan: expected a number in"),
        ({"validation_fraction": "0.5"}, "validation_fraction='0.5': expected float"),
        ({"mask_fraction": float("inf")}, r"mask_fraction=inf: expected a number in \[0, 1\)"),
        ({"tokenizer": "bpe:0300"}, "tokenizer='bpe:0300': expected 'bytes', 'bpe:N'"),
        ({"tokenizer": "bpe:" + "9" * 5000}, "9': expected between 257 .* and 65536 entries"),
        ({"image_size": 32}, "image_size=32 does not apply to source='stdlib'"),
        ({"source": "pathfinder:64"}, "source='pathfinder:64': expected one of"),
        ({"label_key": "label"}, "label_key='label' does not apply to source='stdlib'"),
        ({"truncate": True}, "truncate=True does not apply to source='stdlib'; leave it at False"),
        (
            {"source": "listops", "tokenizer": "bpe:300"},
            "tokenizer='bpe:300' does not apply to source='listops'",
        ),
    ],
)
def test_settings_out_of_range_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**SETTINGS | settings)


def test_a_batch_that_cannot_be_shared_is_refused():
    config = DataConfig(**SETTINGS)
    with pytest.raises(ValueError, match="batch_size=2: expected a multiple of the 3 processes"):
        make_data(config, process_count=3)
    with pytest.raises(ValueError, match=r"process_index=2: expected a number in \[0, 2\)"):
        make_data(config, process_index=2, process_count=2)


def test_prepare_command_builds_the_caches(images, tmp_path, capsys):
    arguments = [f"--source=idx:{tmp_path / 'idx'}", f"--data_dir={tmp_path / 'data'}"]
    main(arguments)
    assert "is ready in" in capsys.readouterr().out
    caches = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("tokens.bin")}
    make_files(tmp_path, "idx", sequence_length=6)
    assert len(caches) == 2
    assert all(path.stat().st_mtime_ns == written for path, written in caches.items())


def test_prepare_command_answers_a_mistake_with_one_line_and_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--source=idx:/nowhere", f"--data_dir={tmp_path}"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "source='idx:/nowhere': no such folder\n"
