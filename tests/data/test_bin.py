"""Files of ids: what of them is read, mapped and refused."""

import numpy as np
import pytest

from sparsejax.data import DataConfig, describe_data, load_tokenizer, make_data
from sparsejax.data.shards import ShardStream, read_shard
from sparsejax.data.sources.bin import open_bin


def write_ids(path, ids, *, magic=None, version=1, dtype="<u2", announced=None):
    """Write ids as nanoGPT does or, with a magic number, as llm.c does."""
    header = np.zeros(256 if magic else 0, "<i4")
    if magic:
        header[:3] = magic, version, len(ids) if announced is None else announced
    path.write_bytes(header.tobytes() + np.asarray(ids, dtype).tobytes())


def write_nanogpt(folder, train, validation):
    write_ids(folder / "train.bin", train)
    write_ids(folder / "val.bin", validation)


def write_llm_c(folder, train, validation):
    half = len(train) // 2
    for number, ids in enumerate((train[:half], train[half:])):
        write_ids(folder / f"fineweb_train_00000{number}.bin", ids, magic=20240520)
    write_ids(folder / "fineweb_val_000000.bin", validation, magic=20240520)


def write_llama(folder, train, validation):
    for name, ids in (("train", train), ("val", validation)):
        settings = {"magic": 20240801, "version": 7, "dtype": "<u4"}
        write_ids(folder / f"tiny_{name}.bin", ids, **settings)


def make_config(path, data_dir, **settings):
    defaults = {"sequence_length": 7, "batch_size": 2, "tokenizer": "ids:50257"}
    return DataConfig(source=f"bin:{path}", data_dir=str(data_dir), **defaults | settings)


RNG = np.random.default_rng(0)
TRAIN, VALIDATION = RNG.integers(0, 50_257, 165), RNG.integers(0, 50_257, 83)


@pytest.mark.parametrize("write", [write_nanogpt, write_llm_c, write_llama])
def test_windows_are_those_of_the_files_which_are_copied_nowhere(write, tmp_path):
    (tmp_path / "set").mkdir()
    write(tmp_path / "set", TRAIN, VALIDATION)
    config = make_config(tmp_path / "set", tmp_path / "data")
    data = make_data(config)
    assert data.spec == describe_data(config) == ("language_model", 50_257, 0, 0)
    rows = [row for _ in range(10) for row in next(data.train)["inputs"].tolist()]
    assert sorted(rows) == sorted(TRAIN[8 * i : 8 * i + 7].tolist() for i in range(20))
    batches = list(data.validation(None))
    rows = [row.tolist() for batch in batches for row in batch["targets"]]
    assert sorted(rows[:10]) == sorted(
        VALIDATION[8 * i + 1 : 8 * i + 8].tolist() for i in range(10)
    )
    assert batches[0]["inputs"].dtype == np.int32
    assert sum(f.stat().st_size for f in (tmp_path / "data").rglob("*") if f.is_file()) < 2_000
    assert load_tokenizer(data.tokenizer.name, tmp_path).vocab_size == 50_257


def test_files_are_found_by_a_pattern_and_by_name(tmp_path):
    write_llm_c(tmp_path, TRAIN, VALIDATION)
    write_ids(tmp_path / "other_train.bin", [1] * 8)
    source = open_bin(make_config(tmp_path / "fineweb_*.bin", tmp_path))
    assert [shard.path.name for shard in source.shards["train"]] == [
        "fineweb_train_000000.bin",
        "fineweb_train_000001.bin",
    ]
    one = open_bin(make_config(tmp_path / "other_train.bin", tmp_path, validation_fraction=0.5))
    assert {split: [s.num_ids for s in shards] for split, shards in one.shards.items()} == {
        "train": [4],
        "validation": [4],
    }
    with pytest.raises(ValueError, match="found no file; expected some"):
        open_bin(make_config(tmp_path / "none*", tmp_path))


def test_the_tail_is_held_out_where_no_file_is_for_validation(tmp_path):
    write_ids(tmp_path / "train_0.bin", TRAIN[:100])
    write_ids(tmp_path / "train_1.bin", TRAIN[100:], magic=20240801, version=7, dtype="<u4")
    source = open_bin(make_config(tmp_path, tmp_path, validation_fraction=0.2))
    streams = {split: ShardStream(shards) for split, shards in source.shards.items()}
    assert streams["train"].size == 132 and streams["validation"].size == 33
    np.testing.assert_array_equal(streams["train"][:], TRAIN[:132])
    np.testing.assert_array_equal(streams["validation"][:], TRAIN[132:])
    np.testing.assert_array_equal(streams["train"][95:105], TRAIN[95:105])
    assert streams["train"][132:].size == 0
    examples = [example.documents[0] for example in source.read("train")]
    np.testing.assert_array_equal(np.concatenate(examples), TRAIN[:132])


def test_ids_that_the_tokenizer_lacks_are_refused_by_file_and_position(tmp_path):
    write_ids(tmp_path / "train.bin", [1, 2, 3, 500, 4, 600] * 8)
    write_ids(tmp_path / "val.bin", [1] * 16)
    with pytest.raises(
        ValueError, match=r"train\.bin holds the id 500 at position 3; expected ids"
    ):
        make_data(make_config(tmp_path, tmp_path / "data", tokenizer="ids:500"))
    data = make_data(make_config(tmp_path, tmp_path / "data", tokenizer="ids:601"))
    with pytest.raises(
        ValueError, match=r"holds the id 600 at position 5; expected ids in \[0, 600"
    ):
        make_data(make_config(tmp_path, tmp_path / "data", tokenizer="ids:600"))
    (tmp_path / "val.bin").unlink()
    write_ids(tmp_path / "train.bin", [1] * 60 + [700] * 4)
    with pytest.raises(ValueError, match="holds the id 700 at position 60; expected"):
        config = {"validation_fraction": 0.3, "tokenizer": "ids:601"}
        make_data(make_config(tmp_path, tmp_path / "data", **config))
    assert data.spec.vocab_size == 601


def test_the_fingerprint_follows_the_ids(tmp_path):
    found = []
    for ids in (TRAIN, TRAIN.copy(), TRAIN[::-1]):
        write_nanogpt(tmp_path, ids, VALIDATION)
        found.append(make_data(make_config(tmp_path, tmp_path / "data")).fingerprint)
    assert found[0] == found[1] != found[2]
    assert found[0]["train_examples"] == 20 and found[0]["tokenizer"] == "values:50257"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ids": []}, r"x\.bin has 0 bytes; expected ids of 2 bytes each"),
        ({"ids": [1, 2, 3], "dtype": "u1"}, r"x\.bin has 3 bytes; expected ids of 2 bytes each"),
        (
            {"ids": [1], "magic": 20240522},
            "has a header of format 20240522 version 1; expected ids, which are 20240520 version",
        ),
        (
            {"ids": [1], "magic": 20240520, "version": 2},
            "of format 20240520 version 2; expected ids",
        ),
        (
            {"ids": [1, 2], "magic": 20240520, "announced": 3},
            "announces 3 ids and has 1028 bytes; expected 1030 for at least one",
        ),
        (
            {"ids": [], "magic": 20240520},
            "announces 0 ids and has 1024 bytes; expected 1024 for at",
        ),
        ({"ids": [], "magic": 20240801, "version": 7, "announced": -1}, "announces -1 ids"),
    ],
)
def test_files_of_another_format_are_refused(settings, message, tmp_path):
    write_ids(tmp_path / "x.bin", **settings)
    with pytest.raises(ValueError, match=message):
        read_shard(tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("source", "tokenizer", "message"),
    [
        (
            "bin:/x",
            "bytes",
            "tokenizer='bytes' does not apply to source='bin:/x'; expected 'ids:N' or",
        ),
        (
            "bin:/x",
            "bpe:300",
            "tokenizer='bpe:300' does not apply to source='bin:/x'; expected 'ids",
        ),
        (
            "text:/x",
            "ids:300",
            "tokenizer='ids:300' does not apply to source='text:/x'; expected 'by",
        ),
        ("bin:/x", "ids:1", "tokenizer='ids:1': expected between 2 and 2147483647 entries"),
        ("bin:/x", "ids:99999999999", "expected between 2 and 2147483647 entries"),
        ("idx:/x", "ids:300", "tokenizer='ids:300' does not apply to source='idx:/x'; leave it at"),
        ("text:/x", "file:", "tokenizer='file:': expected 'bytes', 'bpe:N'"),
    ],
)
def test_ids_and_texts_have_tokenizers_of_their_own(source, tokenizer, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(source=source, tokenizer=tokenizer)
