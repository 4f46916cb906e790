"""Text corpora: what is read, how it is split, tokenized and refused."""

import codecs
import gzip
import os
import platform
import subprocess
import sys

import numpy as np
import pytest

from sparsejax.data import DataConfig, describe_data, keep_tokenizer, load_tokenizer, make_data
from sparsejax.data.bpe import load_bpe, train_bpe
from sparsejax.data.prepare import main
from sparsejax.data.sources import text
from sparsejax.data.sources.stdlib import open_stdlib
from sparsejax.data.sources.text import open_text
from sparsejax.data.store import Windows, map_tokens
from sparsejax.data.token_files import write_stream
from sparsejax.data.tokenizer import byte_tokenizer
from sparsejax.strict_json import dump_json, load_json


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
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("not part of the corpus")
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
    windows = Windows(map_tokens(tmp_path, byte_tokenizer()), 15)
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


@pytest.mark.parametrize(
    "name", ["", "words", "bytes:", "bpe:300", "bpe:x:0123456789abcdef", "values:", "values:-3"]
)
def test_a_run_has_no_tokenizer_of_another_name(name, tmp_path):
    with pytest.raises(ValueError, match="must be 'bytes', 'values:N', 'bpe:N:HASH' or 'file:"):
        load_tokenizer(name, tmp_path)
    with pytest.raises(ValueError, match="got 'values:9"):
        load_tokenizer("values:" + "9" * 5_000, tmp_path)


@pytest.mark.parametrize("contents", [b"", b"[" * 200_000, b"\xff", b'{"version": "1.0"}'])
def test_a_kept_tokenizer_is_the_one_it_was(contents, folder, tmp_path):
    tokenizer = make_text_data(folder, tmp_path / "data", tokenizer="bpe:258").tokenizer
    file, victim = tmp_path / "tokenizer.json", tmp_path / "victim"
    victim.write_text("precious")
    file.symlink_to(victim)
    keep_tokenizer(tokenizer, tmp_path)
    assert victim.read_text() == "precious"
    loaded = load_tokenizer(tokenizer.name, tmp_path)
    assert loaded.decode(loaded.encode([b"Text"])[0]) == b"Text"
    file.write_bytes(contents)
    with pytest.raises(
        ValueError, match=r"tokenizer\.json must be tokenizer 'bpe:258:\w+', but is"
    ):
        load_tokenizer(tokenizer.name, tmp_path)
    with pytest.raises(
        ValueError, match=r"tokenizer\.json must be readable by tokenizers \d"
    ) as bad:
        load_bpe(tmp_path, "bpe")
    assert "\n" not in str(bad.value)
    file.unlink()
    with pytest.raises(ValueError, match=r"must hold the tokenizer\.json of tokenizer .* none"):
        load_tokenizer(tokenizer.name, tmp_path)


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


def test_an_unreadable_folder_is_named(folder, tmp_path, monkeypatch):
    def refuse(path):
        if os.fspath(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    scan = os.scandir
    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(ValueError, match=r"cannot read '.*/sub': Permission denied"):
        open_text(make_config(folder, tmp_path))


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    path = tmp_path / "book.txt"
    path.write_text("words " * 100)

    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ValueError, match=r"cannot read '.*book\.txt': Permission denied"):
        open_text(make_config(path, tmp_path))


NO_TEXT = {
    "latin.txt": (b"plain line\n" * 50 + b"caf\xe9\n" + b"plain line\n" * 50, "no character", 553),
    "cut.txt": (b"plain line\n" * 50 + b"\xe2\x82", "no character", 550),
    "zero.bin": (b"plain line\n" * 50 + b"a\0b", "byte 0", 551),
    "set.parquet": (b"PAR1\x15\0\x15\xbe" * 50, "byte 0", 5),
    "book.txt.gz": (gzip.compress(b"plain line\n" * 50, mtime=0) * 9, "byte 0", 3),
    "wide.txt": (("plain line\n" * 50).encode("utf-16"), "byte 0", 3),
}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:260"])
@pytest.mark.parametrize("name", NO_TEXT)
def test_what_is_no_text_is_refused_by_name_and_position(name, tokenizer, tmp_path):
    contents, found, position = NO_TEXT[name]
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text("plain line\n" * 20)
    message = rf"'\S*{name}' is not text: {found} at position {position}; expected UTF-8 without"
    for path, source in ((tmp_path / name, tmp_path / name), (folder / name, folder)):
        path.write_bytes(contents)
        with pytest.raises(ValueError, match=message) as refused:
            make_text_data(source, tmp_path / "data", tokenizer=tokenizer)
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=r"begins b'caf\\xe9' is not UTF-8 at byte 3"):
        train_bpe(tmp_path, [b"caf\xe9"], 300)


def test_a_byte_order_mark_is_no_text(folder, tmp_path):
    marked = tmp_path / "marked"
    for file in folder.rglob("*.txt"):
        copy = marked / file.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    file = tmp_path / "file.txt"
    # A mark within the text is a character, which joins words without a space.
    file.write_text("\ufeffOne\ufefftwo.\n" * 50, encoding="utf-8")
    for split in ("train", "validation"):
        plain, found = (
            read_documents(open_text(make_config(f, tmp_path)), split) for f in (folder, marked)
        )
        assert found == plain
    (train,) = read_documents(open_text(make_config(file, tmp_path)), "train")
    assert train.startswith("One\ufefftwo.\n\ufeffOne".encode())


def test_a_file_may_have_any_name(folder, tmp_path, capsys):
    name = os.fsdecode(b"caf\xe9 \xff\n.txt")
    root = tmp_path / os.fsdecode(b"corpus-\xe9")
    folder.rename(root)
    (root / name).write_text("some text\n" * 9)
    settings = {"tokenizer": "bpe:270", "sequence_length": 1}
    data = make_text_data(root, root / ".data", **settings)
    next(data.train)
    assert load_json(dump_json(data.fingerprint)) == data.fingerprint
    folder = tmp_path / os.fsdecode(b"kept-\xe9")
    folder.mkdir()
    keep_tokenizer(data.tokenizer, folder)
    assert load_tokenizer(data.tokenizer.name, folder).vocab_size == 270
    again = make_text_data(root, root / ".data", **settings)
    assert again.fingerprint == data.fingerprint
    main([f"--source=text:{root}", f"--data_dir={root / '.data'}"])
    assert "is ready in" in capsys.readouterr().out
    (root / name).write_bytes(b"\xff" * 9)
    with pytest.raises(ValueError, match=r"caf\\udce9 \\udcff\\n\.txt' is not text: no") as refused:
        make_text_data(root, root / ".data")
    str(refused.value).encode()


@pytest.mark.parametrize("character", ["a", "ä", "€", "😀"])
def test_a_line_of_any_length_is_read_in_short_pieces(character, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_PIECE_BYTES", 100)
    monkeypatch.setattr(text, "_LONGEST_LINE_BYTES", 201)
    path = tmp_path / "line.txt"
    contents = ("x" + character * 5_000 + "\n").encode()
    path.write_bytes(contents)
    source = open_text(make_config(path, tmp_path))
    examples = [e for split in ("train", "validation") for e in source.read(split)]
    pieces = [e.documents[0] for e in examples]
    assert b"".join(pieces) == contents
    assert max(map(len, pieces)) <= 304
    assert all(piece.decode() for piece in pieces)
    assert sum(e.complete for e in examples) == 2


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("words " * 100)
    source = open_text(make_config(path, tmp_path))
    os.truncate(path, 300)
    with pytest.raises(ValueError, match=r"book\.txt' has shrunk; expected 420 bytes"):
        list(source.read("train"))


MEASURED_SOURCE = """
import resource, sys
from sparsejax.data.sources.text import open_text
from sparsejax.data import DataConfig
from sparsejax.data.token_files import write_stream
from sparsejax.data.tokenizer import byte_tokenizer
from pathlib import Path
import numpy as np
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before = peak()
source = open_text(DataConfig(source="text:" + sys.argv[1], validation_fraction=0.5))
for split in ("train", "validation"):
    write_stream(Path(sys.argv[2]), source.read(split), byte_tokenizer())
print(peak() - before)
"""


@pytest.mark.ci
def test_one_line_of_200_megabytes_takes_little_memory(tmp_path):
    path = tmp_path / "line.txt"
    with path.open("wb") as file:
        for _ in range(200):
            file.write(b"word " * 200_000)
    command = [sys.executable, "-c", MEASURED_SOURCE, str(path), str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(found.stdout) < 100


def test_settings_the_corpus_cannot_meet_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="sequence_length=100000: the train split .* not one"):
        make_text_data(folder, tmp_path / "data", sequence_length=100_000)
    with pytest.raises(ValueError, match=r"batch_size=1000: the train split .* expected at most"):
        make_text_data(folder, tmp_path / "data", batch_size=1000)
    with pytest.raises(ValueError, match=r"'bpe:5000': the training split yields only \d+ entries"):
        make_text_data(folder, tmp_path / "data", tokenizer="bpe:5000")
