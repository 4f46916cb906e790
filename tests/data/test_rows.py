"""Sets of rows in every format: what is read, how it is split and labelled, what is refused."""

import json

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from sparsejax.data import DataConfig, describe_data, make_data
from sparsejax.data.rows import list_classes
from sparsejax.data.sources import load_source
from tests.data.row_files import FORMATS, make_table, write_dataset, write_rows

TEXTS = [f"Text number {i} é, twice {2 * i}.\n" for i in range(60)]
CLASS_LABEL = {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}


def make_config(source, data_dir, **settings):
    defaults = {"sequence_length": 15, "batch_size": 2}
    return DataConfig(source=source, data_dir=str(data_dir), **defaults | settings)


def open_rows(source, **settings):
    config = make_config(source, "unused", **settings)
    return load_source(config.kind).open(config)


def read_texts(source, split, **settings):
    examples = list(open_rows(source, **settings).read(split))
    assert all(example.complete for example in examples)
    return [example.documents[0].decode() for example in examples]


@pytest.mark.parametrize("form", FORMATS)
def test_rows_are_held_out_by_their_texts(form, tmp_path):
    rows = [{"text": text, "other": "x"} for text in TEXTS]
    source = write_rows(tmp_path / "a", form, {"train": rows})
    train, held_out = (
        read_texts(source, split, validation_fraction=0.3) for split in ("train", "validation")
    )
    assert train == [text for text in TEXTS if text not in held_out]
    assert sorted(train + held_out) == sorted(TEXTS) and 8 <= len(held_out) <= 28
    # Whatever is added, and wherever it lies.
    more = write_rows(
        tmp_path / "b", form, {"train": [{"text": "New.", "other": ""}, *rows, *rows]}
    )
    again = read_texts(more, "validation", validation_fraction=0.3)
    assert [text for text in again if text != "New."] == 2 * held_out


@pytest.mark.parametrize("form", FORMATS)
def test_splits_go_by_names(form, tmp_path):
    named = {
        name: [{"body": f"{name} {i}"} for i in range(5)]
        for name in ("train", "test", "validation", "clean")
    }
    source = write_rows(tmp_path / "a", form, named)
    settings = {"input_key": "body"}
    for split in ("train", "validation"):
        assert read_texts(source, split, **settings) == [f"{split} {i}" for i in range(5)]
    settings |= {"train_split": "clean", "validation_split": "test"}
    assert read_texts(source, "train", **settings)[0] == "clean 0"
    assert read_texts(source, "validation", **settings)[0] == "test 0"
    with pytest.raises(ValueError, match=r"validation_fraction=0\.5 does not apply to .* leave it"):
        open_rows(source, validation_fraction=0.5)
    with pytest.raises(ValueError, match=r"found .*clean.*; expected splits 'train' and 'dev', or"):
        open_rows(source, validation_split="dev")


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (["test", "essay"], {}, "expected splits 'train' and 'validation' or 'valid' or"),
        (["train", "essay"], {}, "found essay.jsonl, train.jsonl; expected splits 'train' and"),
        (["train", "val_train"], {}, "found val_train.jsonl in both splits; expected names of one"),
        (["a"], {"train_split": "train"}, "found a.jsonl; expected splits 'train' and"),
        ([], {}, r"the folder holds no \*\.jsonl or \*\.jsonl\.gz"),
    ],
)
def test_names_that_do_not_tell_the_splits_are_refused(names, settings, message, tmp_path):
    (tmp_path / "README.md").write_text("not part of the set")
    source = write_rows(tmp_path, "jsonl", {name: [{"text": "one"}] for name in names})
    with pytest.raises(ValueError, match=message) as refused:
        open_rows(source, **settings)
    assert "\n" not in str(refused.value)


def test_words_of_names_and_folders_tell_the_splits(tmp_path):
    for name in ("train", "training", "pretrain"):
        rows = {number: [{"text": f"{name} {number}"}] for number in ("00", "01")}
        write_rows(tmp_path / name, "jsonl", rows)
    source = write_rows(tmp_path, "jsonl", {"c4-val.00000-of-00001": [{"text": "held out"}]})
    assert read_texts(source, "train") == ["train 00", "train 01"]
    assert read_texts(source, "validation") == ["held out"]
    alone = f"{source}/c4-val.00000-of-00001.jsonl"
    assert read_texts(alone, "train", validation_fraction=0.001) == ["held out"]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", ["numbers", "names"])
def test_labels_are_numbers_or_names_in_their_order(form, kind, tmp_path):
    labels = {"numbers": [0, 2, 1, 2], "names": ["b", "c", "a", "c"]}[kind]
    numbers = {"numbers": [0, 2, 1, 2], "names": [1, 2, 0, 2]}[kind]
    rows = [{"text": f"{i} {label}", "answer": label} for i, label in enumerate(labels)]
    value = {"dtype": "int64", "_type": "Value"}
    features = {"answer": value} if kind == "numbers" else {}
    source = write_rows(tmp_path / "a", form, {"train": rows, "test": rows[:2]}, **features)
    config = make_config(source, tmp_path / "data", label_key="answer")
    data = make_data(config)
    assert data.spec == describe_data(config) == ("classification", 257, 3, 0)
    found = {}
    for batch in (next(data.train), next(data.train)):
        for ids, mask, label in zip(batch["inputs"], batch["mask"], batch["labels"], strict=True):
            found[bytes((ids[mask] - 1).tolist()).decode()] = int(label)
    assert found == {row["text"]: n for row, n in zip(rows, numbers, strict=True)}


def test_names_of_classes_are_in_order():
    labels = [f"class {i}" for i in range(30)]
    assert list_classes(("here", x) for x in labels) == (30, tuple(sorted(labels)))


def test_a_class_label_that_a_set_declares_is_predicted(tmp_path):
    rows = [{"text": f"text {i}", "label": i % 2, "title": "x"} for i in range(6)]
    source = write_rows(tmp_path / "a", "hf", {"train": rows, "test": rows[:3]}, **CLASS_LABEL)
    config = make_config(source, tmp_path / "data")
    assert make_data(config).spec == describe_data(config) == ("classification", 257, 2, 0)
    rows[4]["label"] = -1
    write_rows(tmp_path / "a", "hf", {"train": rows, "test": rows[:3]}, **CLASS_LABEL)
    with pytest.raises(
        ValueError, match=r"00001-of-00002\.arrow, row 2 has the label -1; expected"
    ):
        make_data(config)


@pytest.mark.parametrize("form", FORMATS)
def test_a_changed_file_changes_the_fingerprint(form, tmp_path):
    config = make_config(f"{form.partition('.')[0]}:{tmp_path / 'a'}", tmp_path / "data")
    found = []
    for word in ("Text", "Text", "Test"):
        rows = [{"text": text.replace("Text", word)} for text in TEXTS]
        write_rows(tmp_path / "a", form, {"train": rows})
        found.append(make_data(config).fingerprint)
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("form", FORMATS)
def test_a_corpus_is_described_without_its_rows_and_masked(form, tmp_path):
    source = write_rows(tmp_path / "a", form, {"train": [{"text": text} for text in TEXTS]})
    config = make_config(source, tmp_path / "data", mask_fraction=0.2)
    for file in (tmp_path / "a").rglob("*.[jpa][sar][oqr]*"):
        if file.suffix != ".json":
            file.write_bytes(b"nothing")
    assert describe_data(config) == ("masked_language_model", 257, 0, 0)
    with pytest.raises(ValueError, match=r"mask_fraction=0\.2: .* have labels"):
        write_rows(tmp_path / "a", form, {"train": [{"text": text, "x": "y"} for text in TEXTS]})
        describe_data(make_config(source, tmp_path / "data", mask_fraction=0.2, label_key="x"))


BAD_LINES = {
    "no JSON": ("{'text': 1}", r"line 2 is not JSON \(Expecting .*\); expected one object a line"),
    "no UTF-8": (b'{"text": "caf\xe9"}', "line 2 is not JSON .*can't decode byte 0xe9"),
    "deep": ("[" * 100_000, "line 2 is not JSON .*recursion"),
    "a list": ('["text"]', r"line 2 holds '\[\"text\"\]'; expected a JSON object"),
    "nothing": ("", "line 2 is empty; expected a JSON object"),
    "no key": ('{"body": "x"}', r"line 2 has no 'text', but \['body'\]; expected it in every"),
    "a number": ('{"text": 3}', "line 2 has 3 for a text; expected a string"),
    "null": ('{"text": null}', "line 2 has None for a text; expected a string"),
    "empty": ('{"text": ""}', "line 2 has an empty text; expected characters"),
    "byte 0": (r'{"text": "a\u0000b"}', "line 2 has a text with the character 0; expected text"),
    "a surrogate": (r'{"text": "a\ud800"}', "line 2 has half a character at 1 of its text"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines_are_refused_by_number(case, tmp_path):
    line, message = BAD_LINES[case]
    line = line if isinstance(line, bytes) else line.encode()
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "three"}\n')
    with pytest.raises(ValueError, match=rf"rows\.jsonl, {message}") as refused:
        read_texts(f"jsonl:{file}", "train", validation_fraction=0.001)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["1", '"a"'], "line 2 has the label 'a' where others are numbers; expected one kind"),
        (["1", "true"], r"line 2 has the label True; expected a whole number in \[0, 1048576\) or"),
        (["0", "-1"], "line 2 has the label -1; expected a whole number"),
        (["0", "1.0"], r"line 2 has the label 1\.0; expected a whole number"),
        (["0", "99999999"], "line 2 has the label 99999999; expected a whole number"),
        (["0", "null"], "line 2 has the label None; expected a whole number"),
    ],
)
def test_bad_labels_are_refused_by_line(labels, message, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"text": "x", "label": {label}}}\n' for label in labels))
    with pytest.raises(ValueError, match=message):
        describe_data(make_config(f"jsonl:{file}", tmp_path / "data", label_key="label"))


def test_damaged_tables_are_refused_in_one_line(tmp_path):
    file = tmp_path / "rows.parquet"
    rows = [{"text": None if i == 8 else f"text {i}", "n": i} for i in range(20)]
    parquet.write_table(make_table(rows), file)
    source = f"parquet:{file}"
    with pytest.raises(
        ValueError, match=r"rows\.parquet, row 9 has None for a text; expected a st"
    ):
        read_texts(source, "train")
    with pytest.raises(ValueError, match="row 1 has 0 for a text; expected a string"):
        read_texts(source, "train", input_key="n")
    with pytest.raises(
        ValueError, match="has no column 'body', but text: string, n: int64; expect"
    ):
        read_texts(source, "train", input_key="body")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"rows\.parquet cannot be read: .*; expected a Parquet f"):
        read_texts(source, "train")


def test_a_table_of_lines_may_have_empty_ones_in_a_corpus_alone(tmp_path):
    file = tmp_path / "rows.parquet"
    parquet.write_table(make_table([{"text": t, "n": 0} for t in ("= Title =", "", "Text.")]), file)
    settings = {"validation_fraction": 0.001}
    assert read_texts(f"parquet:{file}", "train", **settings) == ["= Title =", "", "Text."]
    with pytest.raises(ValueError, match="row 2 has an empty text; expected characters"):
        read_texts(f"parquet:{file}", "train", label_key="n", **settings)


def test_a_split_without_rows_is_refused(tmp_path):
    source = write_rows(tmp_path, "jsonl", {"rows": [{"text": "only one"}]})
    with pytest.raises(
        ValueError, match=r"the \w+ split has no line, with validation_fraction=0\."
    ):
        for split in ("train", "validation"):
            read_texts(source, split)


def test_what_is_no_saved_set_is_refused(tmp_path):
    root, rows = tmp_path / "a", [{"text": "one"}, {"text": "two"}]
    with pytest.raises(ValueError, match=r"holds neither dataset_dict\.json nor state\.json; expe"):
        open_rows(f"hf:{root}")
    write_dataset(root, rows, {})
    with pytest.raises(ValueError, match="has no splits with names; leave train_split and"):
        open_rows(f"hf:{root}", train_split="train")
    with pytest.raises(ValueError, match="patch_size=2 does not apply to the texts of hf:"):
        open_rows(f"hf:{root}", patch_size=2)
    with pytest.raises(
        ValueError, match="input_key='body': hf:.* has text: string; expected the na"
    ):
        open_rows(f"hf:{root}", input_key="body")
    with pytest.raises(ValueError, match="label_key='label': hf:.* has text; expected the name of"):
        open_rows(f"hf:{root}", label_key="label")
    state = json.loads((root / "state.json").read_text())
    shuffled = state | {"_indices_data_files": [{"filename": "indices.arrow"}]}
    (root / "state.json").write_text(json.dumps(shuffled))
    with pytest.raises(ValueError, match=r"rows out of order, .*: flatten_indices\(\) before save"):
        open_rows(f"hf:{root}")
    (root / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": "../x"}]}))
    with pytest.raises(
        ValueError, match=r"state\.json names the files \['\.\./x'\]; expected what"
    ):
        open_rows(f"hf:{root}")
    (root / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"state\.json cannot be read: .*; expected what save_to"):
        open_rows(f"hf:{root}")
    write_dataset(root, rows, {})
    (root / "data-00000-of-00002.arrow").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match=r"arrow cannot be read: .*; expected what save_to_disk"):
        read_texts(f"hf:{root}", "train", validation_fraction=0.001)


def test_large_strings_are_texts(tmp_path):
    table = pyarrow.table({"text": pyarrow.array(TEXTS, pyarrow.large_string())})
    parquet.write_table(table, tmp_path / "rows.parquet")
    source = f"parquet:{tmp_path}"
    config = make_config(source, tmp_path / "data", validation_fraction=0.3)
    ids = next(make_data(config).train)["inputs"]
    assert ids.dtype == np.int32 and ids.max() < 256
