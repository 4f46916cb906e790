"""Tokenizers that exist already: what they encode, where a text ends, what is refused."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from sparsejax.data import (
    DataConfig,
    Example,
    describe_data,
    keep_tokenizer,
    load_tokenizer,
    make_data,
)
from sparsejax.data import pieces as joining
from sparsejax.data.sources import text as text_source
from sparsejax.data.tokenizer import make_tokenizer
from sparsejax.data.tokenizer_files import open_tokenizer_file

# As code: indented, with empty lines and runs of spaces.
TEXT = "".join(
    f"def function_{i}(first,  second):\n    '''Say what it is, and why.'''\n\n"
    f"    if first == {i}:\n        return second + {i * i}\n\n\n"
    for i in range(40)
)
ENDS = "<|endoftext|>"


def train_byte_level(special=(ENDS,)):
    """Train a tokenizer like GPT-2's, that asks for what nobody wants of a corpus."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    model.train_from_iterator([TEXT], trainer)
    # At the end, as in GPT-2's.
    model.add_special_tokens(list(special))
    return model


def save(model, folder, **config):
    folder.mkdir(exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return f"file:{folder}"


def make_words(count, special=()):
    """Make a tokenizer of the words "0", "1", ..."""
    vocabulary = {str(i): i for i in range(count)}
    model = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(list(special))
    return model


def make_config(path, data_dir, **settings):
    defaults = {"sequence_length": 15, "batch_size": 2}
    return DataConfig(source=f"text:{path}", data_dir=str(data_dir), **defaults | settings)


def read_tokens(data_dir, dtype):
    (file,) = data_dir.glob("tokens/text-train-*/tokens.bin")
    return np.fromfile(file, dtype).tolist()


def write_folder(folder):
    folder.mkdir()
    for i in range(9):
        (folder / f"{i}.py").write_text(TEXT + f"# {i} {ENDS}\n")
    return folder


def test_a_corpus_has_the_ids_of_the_library_and_ends_with_its_token(tmp_path, monkeypatch):
    model = train_byte_level()
    model.enable_truncation(8)
    model.enable_padding(length=9_999)
    model.post_processor = processors.TemplateProcessing(
        single=f"{ENDS} $A", special_tokens=[(ENDS, model.token_to_id(ENDS))]
    )
    folder = write_folder(tmp_path / "corpus")
    monkeypatch.setattr(text_source, "_PIECE_BYTES", 100)
    settings = {"tokenizer": save(model, tmp_path / "model"), "validation_fraction": 0.3}
    config = make_config(folder, tmp_path / "data", **settings)
    data = make_data(config)
    separator = model.token_to_id(ENDS)
    assert data.spec == describe_data(config) == ("language_model", separator + 1, 0, 0)
    parts = "".join(f"{i}," for i in read_tokens(tmp_path / "data", np.uint16)).split(
        f",{separator},"
    )
    plain = train_byte_level(special=())
    expected = []
    for part in parts[:-1]:
        text = plain.decode([int(i) for i in part.split(",")])
        assert text.startswith("def") and text.endswith(f"{ENDS}\n")
        expected.append(",".join(map(str, plain.encode(text).ids)))
    assert parts == [*expected, ""] and 3 <= len(expected) <= 8


def test_a_long_document_has_the_ids_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(joining, "_MOST_CHARACTERS", 700)
    monkeypatch.setattr(text_source, "_PIECE_BYTES", 100)
    (tmp_path / "file.txt").write_text(TEXT)
    model = train_byte_level()
    config = make_config(tmp_path / "file.txt", tmp_path, tokenizer=save(model, tmp_path / "model"))
    make_data(config)
    ids = read_tokens(tmp_path, np.uint16)
    whole = model.encode(TEXT[: len(model.decode(ids, skip_special_tokens=True))]).ids
    assert ids == [*whole, model.token_to_id(ENDS)] and len(whole) > 1_000


def test_what_has_no_words_is_cut_at_lines_or_anywhere(monkeypatch):
    monkeypatch.setattr(joining, "_MOST_CHARACTERS", 5)
    for text, parts in (
        ("a b c d", ["a b", " c d"]),
        ("12\n34\n5", ["12\n", "34\n5"]),
        ("1\n\n234", ["1\n\n", "234"]),
        ("123456", ["12345", "6"]),
        ("語語語語語語", ["語語語語語", "語"]),
    ):
        found = list(joining.join_pieces([Example((text.encode(),))]))
        assert [example.documents[0].decode() for example in found] == parts
        assert [example.complete for example in found] == [False, True]


@pytest.mark.parametrize(
    ("special", "config", "expected"),
    [
        ((ENDS, "</s>"), {}, ENDS),
        (("</s>", ENDS), {"eos_token": "</s>"}, "</s>"),
        ((ENDS, "<e>"), {"eos_token": {"content": "<e>", "lstrip": False}}, "<e>"),
        (("</s>",), {"eos_token": None}, "</s>"),
        (("<|end_of_text|>",), {}, "<|end_of_text|>"),
        (("[CLS]", "[SEP]"), {"sep_token": "[SEP]"}, "[SEP]"),
    ],
)
def test_the_separator_is_the_tokens_own(special, config, expected, tmp_path):
    model = make_words(5, special)
    tokenizer = open_tokenizer_file(save(model, tmp_path / "model", **config))
    assert tokenizer.separator == model.token_to_id(expected)
    (ids,) = tokenizer.encode([f"1 {expected} 2".encode()])
    assert ids.tolist() == [1, 0, 2]


def test_what_has_no_end_of_a_text_is_refused(tmp_path):
    spelled = save(make_words(5), tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"looked for '<\|endoftext\|>', '</s>', .*; expected one, "
    ):
        open_tokenizer_file(spelled)
    save(make_words(5, ["</s>"]), tmp_path / "model", eos_token="<e>")
    with pytest.raises(
        ValueError, match="has no token that ends a text: looked for '<e>'; expected"
    ):
        open_tokenizer_file(spelled)
    for content, message in (
        ('{"eos_token": 3}', "has the eos_token 3; expected the text of a token"),
        ("{", "tokenizer_config.json cannot be read: .*; expected JSON"),
    ):
        (tmp_path / "model" / "tokenizer_config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            open_tokenizer_file(spelled)


def test_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="'file:/nowhere': /nowhere is no file; expected a tokenizer"
    ):
        open_tokenizer_file("file:/nowhere")
    with pytest.raises(
        ValueError, match=r"/tokenizer\.json is no file; expected a tokenizer\.json, "
    ):
        open_tokenizer_file(f"file:{tmp_path}")
    with pytest.raises(ValueError, match="cannot be read: File name too long|is no file"):
        open_tokenizer_file(f"file:/{'a' * 5_000}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"tokenizer\.json must be readable by tokenizers \d"
    ) as bad:
        open_tokenizer_file(f"file:{tmp_path}")
    assert "\n" not in str(bad.value)


def test_more_ids_than_16_bits_hold_and_holes_among_them(tmp_path):
    model = make_words(1)
    vocabulary = {"0": 0, "1": 1, "</s>": 2, "far": 70_000}
    model.model = models.WordLevel(vocabulary, unk_token="0")
    spelled = save(model, tmp_path / "model")
    (tmp_path / "book.txt").write_text("far 1 0\n" * 30)
    settings = {"tokenizer": spelled, "validation_fraction": 0.5}
    config = make_config(tmp_path / "book.txt", tmp_path, **settings)
    data = make_data(config)
    assert data.spec.vocab_size == describe_data(config).vocab_size == 70_001
    ids = read_tokens(tmp_path, np.uint32)
    assert ids[:4] == [70_000, 1, 0, 70_000] and ids[-1] == 2
    assert set(next(data.train)["inputs"].ravel().tolist()) == {70_000, 1, 0}


def test_a_run_keeps_its_tokenizer(tmp_path):
    model = make_words(9, ["</s>"])
    model.save(str(tmp_path / "mine.json"))
    tokenizer = open_tokenizer_file(f"file:{tmp_path / 'mine.json'}")
    assert tokenizer.name.startswith("file:9:10:")
    (tmp_path / "run").mkdir()
    keep_tokenizer(tokenizer, tmp_path / "run")
    loaded = load_tokenizer(tokenizer.name, tmp_path / "run")
    assert (loaded.separator, loaded.vocab_size, loaded.whole_documents) == (9, 10, True)
    (ids,) = loaded.encode([b"1 </s> 2 3"])
    assert ids.tolist() == [1, 0, 2, 3] and loaded.decode(ids) == b"1 0 2 3"
    again = open_tokenizer_file(save(model, tmp_path / "folder"))
    assert again.name == open_tokenizer_file(f"file:{tmp_path / 'mine.json'}").name
    changed = open_tokenizer_file(save(make_words(9, ["</s>", "<e>"]), tmp_path / "folder"))
    assert changed.name != tokenizer.name
    (tmp_path / "run" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"must be tokenizer 'file:9:10:\w+', but is another one"):
        load_tokenizer(tokenizer.name, tmp_path / "run")


def test_sentences_end_with_the_tokenizers_own_end(tmp_path):
    spelled = save(make_words(9, ["</s>"]), tmp_path / "model")
    for name in ("train", "validation"):
        (tmp_path / f"{name}.src").write_text("1 2\n")
        (tmp_path / f"{name}.tgt").write_text("3\n")
    settings = {"sequence_length": 4, "batch_size": 1, "tokenizer": spelled}
    data = make_data(DataConfig(source=f"pairs:{tmp_path}", data_dir=str(tmp_path), **settings))
    (batch,) = data.validation(None)
    assert data.spec.vocab_size == 11
    assert batch["inputs"].tolist() == [[2, 3, 10, 0]]
    assert batch["decoder_inputs"].tolist() == [[10, 4, 0, 0]]
    assert batch["targets"].tolist() == [[4, 10, 0, 0]]


def test_ids_in_files_are_decoded_by_an_existing_tokenizer(tmp_path, monkeypatch):
    save(make_words(9, ["</s>"]), tmp_path / "model")
    for name in ("train", "val"):
        np.arange(1, 10, dtype="<u2").tofile(tmp_path / f"{name}.bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = {"sequence_length": 8, "batch_size": 1, "tokenizer": "file:~/model"}
    config = DataConfig(source=f"bin:{tmp_path}", data_dir=str(tmp_path), **settings)
    data = make_data(config)
    assert data.spec == describe_data(config) == ("language_model", 10, 0, 0)
    ids = next(data.train)["targets"][0]
    assert data.tokenizer.decode(ids) == b"2 3 4 5 6 7 8 </s>"


def test_a_tokenizer_of_the_library_is_taken_as_an_object():
    model = make_words(3, ["<e>"])
    tokenizer = make_tokenizer(model, name="mine", separator=3)
    assert [ids.tolist() for ids in tokenizer.encode([b"1 2", b""])] == [[1, 2], []]
    assert tokenizer.encode([b"1"])[0].dtype == np.uint8 and tokenizer.decode([2, 3]) == b"2 <e>"


def test_a_normalizer_of_the_file_is_applied(tmp_path):
    model = make_words(3, ["</s>"])
    model.normalizer = normalizers.Replace("two", "2")
    (ids,) = open_tokenizer_file(save(model, tmp_path / "model")).encode([b"two 1"])
    assert ids.tolist() == [2, 1]
