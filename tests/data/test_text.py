"""Text corpora: what is read, how it is split, tokenized and refused."""

import os
import platform

import numpy as np
import pytest

from sparsejax.data import DataConfig, describe_data, make_data
from sparsejax.data.sources import text
from sparsejax.data.sources.stdlib import open_stdlib
from sparsejax.data.sources.text import open_text
from sparsejax.data.store import Windows, write_stream
from sparsejax.data.tokenizer import byte_tokenizer, load_bpe, train_bpe


def make_config(path, data_dir, **settings):
    defaults = {"sequence_length": 15, "batch_size": 2, "seed": 0, "validation_fraction": 0.3}
    config = {"source": f"text:{path}", "data_dir": str(data_dir)} | defaults | settings
    return DataConfig(**config)


def make_text_data(path, data_dir, **settings):
    return make_data(make_config(path, data_dir, **settings))


def read_documents(source, split):
    """Return the whole documents of a split, joined from the pieces they are read in."""
    documents, pieces = [], []
    for example in source.read(split):
        pieces += example.documents
        if example.complete:
            documents.append(b"".join(pieces))
            pieces = []
    assert not pieces
    return documents


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "corpus"
    (root / "sub").mkdir(parents=True)
    for i in range(20):
        (root / ("sub" if i % 2 else ".") / f"{i}.txt").write_text(f"Text number {i}.\n" * (3 + i))
    (root / ".hidden").write_text("not part of the corpus")
    return root


def test_folder_is_split_into_whole_files_by_their_names(folder, tmp_path):
    source = open_text(make_config(folder, tmp_path))
    train, validation = read_documents(source, "train"), read_documents(source, "validation")
    assert sorted(train + validation) == sorted(f.read_bytes() for f in folder.rglob("*.txt"))
    assert 2 <= len(validation) <= 10
    moved = folder.rename(tmp_path / "moved")
    (moved / "another.txt").write_text("one more")
    again = read_documents(open_text(make_config(moved, tmp_path)), "validation")
    assert set(validation) <= set(again)


def test_windows_hold_the_stream_and_predict_the_next_token(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_PIECE_BYTES", 100)
    source = open_text(make_config(folder, tmp_path))
    write_stream(tmp_path, source.read("train"), byte_tokenizer())
    stream = b"".join(document + b"\0" for document in read_documents(source, "train"))
    windows = Windows(tmp_path, byte_tokenizer(), 15)
    assert len(windows) == len(stream) // 16
    for i in range(len(windows)):
        window = list(stream[16 * i : 16 * i + 16])
        assert windows[i]["inputs"].tolist() == window[:-1]
        assert windows[i]["targets"].tolist() == window[1:]


def test_batches_have_the_documented_arrays(folder, tmp_path):
    data = make_text_data(folder, tmp_path / "data")
    batch = next(data.train)
    assert {name: (array.dtype.name, array.shape) for name, array in batch.items()} == {
        "inputs": ("int32", (2, 15)),
        "targets": ("int32", (2, 15)),
        "loss_weights": ("float32", (2,)),
    }
    spec = describe_data(make_config(folder, tmp_path / "data"))
    assert data.spec[:3] == spec[:3] == ("language_model", 256, 0)


@pytest.mark.parametrize("line", ["Zeile mit Umlaut: äöü.\n", "ä"])
def test_one_file_is_cut_once_between_lines_or_else_characters(tmp_path, line):
    path = tmp_path / "book.txt"
    text = line * 20_000 + "no newline at the end"
    path.write_text(text, encoding="utf-8")
    source = open_text(make_config(path, tmp_path, validation_fraction=0.1, tokenizer="bpe:300"))
    (train,), (validation,) = (read_documents(source, s) for s in ("train", "validation"))
    assert train + validation == text.encode()
    assert train.decode().endswith(line)
    assert len(validation) == pytest.approx(0.1 * len(text.encode()), rel=0.01)


def test_stdlib_corpus_is_python_source_and_names_its_version():
    source = open_stdlib(DataConfig(source="stdlib"))
    sizes = {}
    for split in ("train", "validation"):
        documents = read_documents(source, split)
        sizes[split] = sum(len(text) for text in documents)
        assert sum("import" in text.decode() for text in documents) > len(documents) / 2
    assert sizes["train"] > 5_000_000
    assert 0.01 < sizes["validation"] / sizes["train"] < 0.15
    assert source.fingerprint == {"python": platform.python_version()}


def test_fingerprint_follows_the_text_and_not_the_time_it_was_written(folder, tmp_path):
    before = make_text_data(folder, tmp_path / "data").fingerprint
    os.utime(folder / "0.txt", (1, 1))
    assert make_text_data(folder, tmp_path / "data").fingerprint == before
    path = folder / "0.txt"
    path.write_text(path.read_text().replace("Text", "Test"))
    after = make_text_data(folder, tmp_path / "data").fingerprint
    assert after["corpus_sha256"] != before["corpus_sha256"]
    assert {**after, "corpus_sha256": 0} == {**before, "corpus_sha256": 0}


def test_bpe_is_trained_on_the_training_split_and_loses_nothing(folder, tmp_path):
    import tokenizers

    data = make_text_data(folder, tmp_path / "data", tokenizer="bpe:270", sequence_length=1)
    config = make_config(folder, tmp_path / "data", tokenizer="bpe:270")
    assert data.spec.vocab_size == describe_data(config).vocab_size == 270
    (saved,) = (tmp_path / "data" / "tokenizers").glob("*/tokenizer.json")
    bpe = tokenizers.Tokenizer.from_file(str(saved))
    (tokens,) = (tmp_path / "data" / "tokens").glob("text-train-*/tokens.bin")
    ids = np.fromfile(tokens, np.uint16)
    expected = read_documents(open_text(make_config(folder, tmp_path)), "train")
    parts = np.split(ids, np.flatnonzero(ids == 0) + 1)[:-1]
    assert [bpe.decode(part.tolist()).encode() for part in parts] == expected
    assert ids.size < 0.9 * sum(map(len, expected))


def test_bpe_is_cached_and_named_by_its_contents(folder, tmp_path):
    data_dir = tmp_path / "data"
    first = make_text_data(folder, data_dir, tokenizer="bpe:270").fingerprint["tokenizer"]
    assert first.startswith("bpe:270:")
    (saved,) = (data_dir / "tokenizers").glob("*/tokenizer.json")
    written = saved.stat().st_mtime_ns
    assert make_text_data(folder, data_dir, tokenizer="bpe:270").fingerprint["tokenizer"] == first
    assert saved.stat().st_mtime_ns == written
    assert make_text_data(folder, data_dir, tokenizer="bpe:265").fingerprint["tokenizer"] != first


def test_bpe_does_not_take_spelled_out_separators_for_real_ones(tmp_path):
    text = b"a b c <|endoftext|> d e f"
    train_bpe(tmp_path, [text], 257)
    (ids,) = load_bpe(tmp_path, "bpe").encode([text])
    assert 0 not in ids and ids.size == len(text)


def test_text_that_cannot_be_read_is_refused_with_its_path(tmp_path):
    with pytest.raises(ValueError, match="source='text:/nowhere': no such file or folder"):
        make_text_data("/nowhere", tmp_path / "data")
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(ValueError, match=r"empty\.txt': the file has 0 bytes; expected enough"):
        make_text_data(empty, tmp_path / "data")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"split has no text; 0 files were found"):
        make_text_data(tmp_path / "folder", tmp_path / "data")
    loop = tmp_path / "folder" / "loop.txt"
    (tmp_path / "folder" / "ok.txt").write_text("some text")
    loop.symlink_to(loop)
    with pytest.raises(ValueError, match="split has no text; 1 files were found"):
        make_text_data(tmp_path / "folder", tmp_path / "data")


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    path = tmp_path / "book.txt"
    path.write_text("words " * 100)

    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ValueError, match=r"cannot read .*book\.txt: Permission denied"):
        open_text(make_config(path, tmp_path))


def test_text_that_is_not_utf8_is_refused_for_bpe_only(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"plain line\n" * 50 + b"caf\xe9\n" + b"plain line\n" * 50)
    make_text_data(path, tmp_path / "data")
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 text at byte 553; expected"):
        make_text_data(path, tmp_path / "data", tokenizer="bpe:300")
    with pytest.raises(ValueError, match=r"begins b'caf\\xe9' is not UTF-8 at byte 3"):
        train_bpe(tmp_path, [b"caf\xe9"], 300)


def test_settings_the_corpus_cannot_meet_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="sequence_length=100000: the train split .* not one"):
        make_text_data(folder, tmp_path / "data", sequence_length=100_000)
    with pytest.raises(ValueError, match=r"batch_size=1000: the train split .* expected at most"):
        make_text_data(folder, tmp_path / "data", batch_size=1000)
    with pytest.raises(ValueError, match=r"'bpe:5000': the training split yields only \d+ entries"):
        make_text_data(folder, tmp_path / "data", tokenizer="bpe:5000")
