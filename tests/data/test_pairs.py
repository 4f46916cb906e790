"""Parallel text: what becomes of two lines, and what is refused."""

import numpy as np
import pytest

from sparsejax.data import DataConfig, describe_data, make_data
from sparsejax.data.lines import read_lines

PAIRS = {
    "train": [("ab", "xyz"), ("", "w"), ("abcde", ""), ("é", "ü!")],
    "validation": [("a", "x"), ("b", "yy"), ("c", "zzz")],
}


def write_pairs(folder, pairs=PAIRS, *, line_end="\n"):
    folder.mkdir(exist_ok=True)
    for split, lines in pairs.items():
        for side, name in enumerate(("src", "tgt")):
            text = "".join(line[side] + line_end for line in lines)
            (folder / f"{split}.{name}").write_bytes(text.encode())
    return folder


def make_config(folder, **settings):
    config = {"source": f"pairs:{folder}", "data_dir": str(folder / "cache")}
    config |= {"sequence_length": 6, "batch_size": 4, "seed": 0}
    return DataConfig(**config | settings)


def read_sentences(batch):
    """Return the sentences that the real tokens of a batch spell, without their ends."""

    def spell(rows, real):
        texts = []
        for ids, kept in zip(rows, real, strict=True):
            assert (ids[~kept] == 0).all()
            *sentence, end = ids[kept].tolist()
            assert end == 1
            texts.append(bytes(i - 1 for i in sentence).decode())
        return texts

    sources = spell(batch["inputs"], batch["mask"])
    return list(zip(sources, spell(batch["targets"], batch["loss_weights"] > 0), strict=True))


def test_two_lines_become_five_rows(tmp_path):
    pairs = {"train": [("ab", "xyz")], "validation": [("ab", "xyz")]}
    data = make_data(make_config(write_pairs(tmp_path, pairs), batch_size=1))
    a, x = ord("a") + 1, ord("x") + 1
    expected = {
        "inputs": [[a, a + 1, 1, 0, 0, 0]],
        "mask": [[True, True, True, False, False, False]],
        "decoder_inputs": [[1, x, x + 1, x + 2, 0, 0]],
        "targets": [[x, x + 1, x + 2, 1, 0, 0]],
        "loss_weights": [[1, 1, 1, 1, 0, 0]],
    }
    for batch in (next(data.train), *data.validation(None)):
        assert {name: rows.tolist() for name, rows in batch.items()} == expected
        types = {name: rows.dtype.name for name, rows in batch.items()}
        assert types == dict.fromkeys(expected, "int32") | {
            "mask": "bool",
            "loss_weights": "float32",
        }


@pytest.mark.parametrize("line_end", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_batches_hold_every_pair_once_and_facts_agree(line_end, tmp_path):
    config = make_config(write_pairs(tmp_path, line_end=line_end))
    data = make_data(config)
    assert data.spec == describe_data(config)
    assert describe_data(config) == ("translation", 257, 0, 0)
    batch = next(data.train)
    assert sorted(read_sentences(batch)) == sorted(PAIRS["train"])
    assert max(rows.max() for rows in batch.values()) < data.spec.vocab_size
    (last,) = data.validation(None)
    assert last["loss_weights"].shape == (4, 6) and last["loss_weights"][3].sum() == 0
    kept = {name: rows[:3] for name, rows in last.items()}
    assert sorted(read_sentences(kept)) == PAIRS["validation"]


def test_a_line_break_at_the_end_is_no_sentence(tmp_path):
    folder = write_pairs(tmp_path)
    file = folder / "train.src"
    file.write_bytes(file.read_bytes().removesuffix(b"\n"))
    assert len(read_sentences(next(make_data(make_config(folder)).train))) == 4
    # A byte-order mark is no part of a sentence.
    (folder / "train.tgt").write_bytes(b"\xef\xbb\xbf" + (folder / "train.tgt").read_bytes())
    found = read_sentences(next(make_data(make_config(folder)).train))
    assert sorted(found) == sorted(PAIRS["train"])
    # A line separator of Unicode is part of a sentence.
    pairs = {"train": [("a\u2028b", "x\x0by")] * 2, "validation": PAIRS["validation"]}
    config = make_config(write_pairs(tmp_path, pairs), batch_size=2)
    assert set(read_sentences(next(make_data(config).train))) == {("a\u2028b", "x\x0by")}


def test_a_line_ends_with_one_break_and_other_returns_are_part_of_it(tmp_path):
    file = tmp_path / "lines"
    file.write_bytes(b"a\r\r\nb\n\r\n\rc\r")
    assert list(read_lines(file)) == [b"a\r", b"b", b"", b"\rc\r"]


def test_both_sides_share_one_trained_vocabulary(tmp_path):
    sides = ("low lower lowest", "new newer newest")
    pairs = {"train": [sides] * 8, "validation": [sides]}
    config = make_config(write_pairs(tmp_path, pairs), tokenizer="bpe:270", sequence_length=16)
    data = make_data(config)
    assert data.spec == describe_data(config)
    assert data.spec.vocab_size == 271
    batch = next(data.train)
    # Merges of either side: three words are fewer tokens than letters.
    for name in ("inputs", "targets"):
        assert (batch[name] > 0).sum(1).max() <= 13
    assert batch["inputs"].max() > 257 < batch["targets"].max()
    assert (batch["inputs"] == 1).sum() == (batch["targets"] == 1).sum() == 4
    # What spells the separator's name is text.
    named = ("<|endoftext|>", "a<|endoftext|>b")
    pairs = {"train": [sides] * 8 + [named], "validation": [named]}
    settings = {"tokenizer": "bpe:270", "sequence_length": 24, "batch_size": 1}
    (batch,) = make_data(make_config(write_pairs(tmp_path, pairs), **settings)).validation(None)
    assert (batch["inputs"] == 1).sum() == (batch["targets"] == 1).sum() == 1


def test_longer_sentences_are_refused_or_cut_without_an_end(tmp_path):
    folder = write_pairs(tmp_path)
    make_data(make_config(folder, sequence_length=6))
    message = (
        r"sequence_length=5: 1 of 8 documents of the train split are longer, the longest has 6 "
        "tokens; expected at least that, or truncate=True"
    )
    with pytest.raises(ValueError, match=message):
        make_data(make_config(folder, sequence_length=5))
    data = make_data(make_config(folder, sequence_length=3, truncate=True))
    rows = {}
    batch = next(data.train)
    for i, source in enumerate(batch["inputs"]):
        rows[bytes(id - 1 for id in source if id > 1)] = {
            k: v[i].tolist() for k, v in batch.items()
        }
    x = ord("x") + 1
    assert rows[b"ab"]["targets"] == [x, x + 1, x + 2]
    assert rows[b"ab"]["decoder_inputs"] == [1, x, x + 1]
    assert rows[b"ab"]["inputs"][2] == 1 and rows[b"ab"]["loss_weights"] == [1, 1, 1]
    assert rows[b"abc"]["mask"] == [True] * 3 and rows[b"abc"]["targets"] == [1, 0, 0]


def test_splits_have_names(tmp_path):
    folder = write_pairs(tmp_path, {"short": PAIRS["train"], "newstest": PAIRS["validation"]})
    config = make_config(folder, train_split="short", validation_split="newstest")
    assert sorted(read_sentences(next(make_data(config).train))) == sorted(PAIRS["train"])
    with pytest.raises(ValueError, match=r"pairs:.*': train\.src is missing"):
        make_data(make_config(folder))


def test_a_stream_resumes_where_it_stood(tmp_path):
    config = make_config(write_pairs(tmp_path), batch_size=3)
    data, again = make_data(config), make_data(config)
    next(data.train)
    state = data.train.get_state()
    expected = [next(data.train) for _ in range(3)]
    again.train.set_state(state)
    for batch in expected:
        found = next(again.train)
        assert found.keys() == batch.keys()
        for name, rows in batch.items():
            np.testing.assert_array_equal(found[name], rows)


@pytest.mark.parametrize(
    ("file", "contents", "message"),
    [
        ("train.tgt", b"x\ny\n", r"train\.tgt ends after line 2 and its twin does not"),
        ("train.src", b"a\n", r"train\.src ends after line 1 and its twin does not"),
        ("validation.tgt", b"x\nyy\nzzz\nmore\n", r"validation\.src ends after line 3 and its"),
        ("train.src", b"a\nb\xff\nc\nd\n", r"train\.src, line 2 is not UTF-8 at byte 1; exp"),
        ("train.tgt", b"a\nb\nc\nd\0e\n", r"train\.tgt, line 4 holds the byte 0; expected text"),
        ("train.src", b"", r"train\.src ends after line 0"),
        ("train.tgt", b"x" * (17 << 20), r"train\.tgt, line 1 is longer than 16,777,216 bytes"),
    ],
)
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:260"])
def test_broken_files_are_refused_by_line(file, contents, message, tokenizer, tmp_path):
    folder = write_pairs(tmp_path)
    (folder / file).write_bytes(contents)
    with pytest.raises(ValueError, match=message):
        make_data(make_config(folder, tokenizer=tokenizer))


def test_options_of_other_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match="label_key='x' does not apply to source='pairs:/pairs'"):
        make_config(tmp_path, source="pairs:/pairs", label_key="x")
    with pytest.raises(ValueError, match=r"source='pairs:': expected one of .*pairs:/folder"):
        make_config(tmp_path, source="pairs:")
