"""Data that a model is evaluated on: every split, other sources, bytes that ids stand for."""

import pytest

from sparsejax.data import DataConfig, change_source, make_data
from sparsejax.data.tokenizer import byte_tokenizer, value_tokenizer

TEXT = "".join(f"Zeile {i}: größer als {i - 1} – 東京.\n" for i in range(60))


def _make_config(folder, **changes):
    path = folder / "text.txt"
    path.write_text(TEXT, "utf-8")
    settings = {"source": f"text:{path}", "data_dir": str(folder / "data"), "batch_size": 4}
    return DataConfig(**settings | {"sequence_length": 32, "validation_fraction": 0.2} | changes)


def _list_inputs(batches):
    return [
        inputs.tobytes()
        for batch in batches
        for inputs, weight in zip(batch["inputs"], batch["loss_weights"], strict=True)
        if weight
    ]


def test_all_is_both_splits_and_each_pass_has_every_example_once(tmp_path):
    data = make_data(_make_config(tmp_path))
    found = {split: _list_inputs(data.passes[split](None)) for split in data.passes}
    assert [*found] == ["train", "validation", "all"]
    assert sorted(found["all"]) == sorted(found["train"] + found["validation"])
    assert len(found["train"]) == data.fingerprint["train_examples"] > 4
    assert found["train"] == _list_inputs(data.passes["train"](None)), "each time in one order"
    assert len(_list_inputs(data.passes["all"](1))) == 4


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_ids_stand_for_all_bytes_of_a_text_and_a_separator_for_one(tokenizer, tmp_path):
    tokenizer = make_data(_make_config(tmp_path, tokenizer=tokenizer)).tokenizer
    lengths = tokenizer.byte_lengths()
    (ids,) = tokenizer.encode([TEXT.encode()])
    assert lengths.shape == (tokenizer.vocab_size,)
    assert lengths[ids].sum() == len(TEXT.encode())
    assert lengths[tokenizer.separator] == 1
    # Not the characters: some are cut in two.
    assert len(ids) > len(TEXT) or tokenizer.name != "bytes"


def test_a_given_tokenizer_encodes_data_that_is_too_little_to_train_on(tmp_path):
    config = _make_config(tmp_path, sequence_length=400, validation_fraction=0.1, batch_size=8)
    with pytest.raises(ValueError, match="expected at most that many|has not one example"):
        make_data(config)
    trained = make_data(_make_config(tmp_path, tokenizer="bpe:300")).tokenizer
    data = make_data(config, tokenizer=trained)
    assert data.tokenizer is trained
    (batch,) = data.passes["all"](None)
    assert batch["inputs"].max() >= 256 and 0 < batch["loss_weights"].sum() < 8
    with pytest.raises(ValueError, match="sequence_length=9000: .* not one example of that length"):
        make_data(_make_config(tmp_path, sequence_length=9000), tokenizer=trained)


def test_a_tokenizer_of_values_encodes_no_text(tmp_path):
    with pytest.raises(ValueError, match="holds text, which the model's tokenizer 'values:9'"):
        make_data(_make_config(tmp_path), tokenizer=value_tokenizer(9))


@pytest.mark.ci
def test_a_tokenizer_of_text_encodes_no_values():
    with pytest.raises(ValueError, match=r"holds values in \[0, 15\), which the .* 'bytes' does"):
        make_data(DataConfig(source="listops:short"), tokenizer=byte_tokenizer())


def test_another_source_is_read_alike_but_for_what_is_named_of_the_first():
    first = DataConfig(
        source="jsonl:/a",
        tokenizer="bpe:300",
        sequence_length=64,
        input_key="content",
        validation_split="held",
    )
    same = change_source(first, "jsonl:/b")
    assert (same.source, same.input_key, same.validation_split) == ("jsonl:/b", "content", "held")
    for source in ("parquet:/b", "text:/b"):
        other = change_source(first, source)
        assert (other.tokenizer, other.sequence_length) == ("bpe:300", 64)
        assert (other.input_key, other.validation_split) == ("", "")
    with pytest.raises(ValueError, match="source='txt:/b'"):
        change_source(first, "txt:/b")
