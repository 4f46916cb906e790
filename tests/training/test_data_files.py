"""Runs on texts and ids in files, with a tokenizer that exists already."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import sparsejax
from sparsejax.config.parse import ConfigError, parse_config
from sparsejax.training.setup import prepare_run
from tests.training.runs import make_settings, train

_RUN = {
    "num_steps": 2,
    "eval_every_steps": 2,
    "recipe__name": "dense",
    "data__validation_fraction": 0.2,
    "optimizer__warmup_fraction": 0.5,
}


@pytest.fixture(name="tokenizer")
def _tokenizer(tmp_path):
    """Return the folder of a tokenizer of words with an end of its own, and its words."""
    words = {str(i): i for i in range(406)} | {"plus": 406, "is": 407, "<eos>": 408}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(["<eos>"])
    folder = tmp_path / "model"
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    return folder, words


def write_jsonl(folder):
    lines = [json.dumps({"text": f"{i} plus {i % 7} is {i + i % 7}"}) for i in range(400)]
    folder = folder / "set"
    folder.mkdir()
    (folder / "sums.jsonl").write_text("\n".join(lines))
    return f"jsonl:{folder}"


def write_bin(folder, words):
    ids = [words[x] for i in range(400) for x in f"{i} plus {i % 6} is {i + i % 6} <eos>".split()]
    folder = folder / "set"
    folder.mkdir()
    (folder / "tokens.bin").write_bytes(np.array(ids, "<u2").tobytes())
    return f"bin:{folder}"


@pytest.mark.ci
def test_a_run_keeps_the_tokenizer_that_it_was_given(tokenizer, tmp_path):
    folder, _ = tokenizer
    changes = {"data__source": write_jsonl(tmp_path), "data__tokenizer": f"file:{folder}"}
    settings = make_settings(tmp_path, **_RUN | changes)
    train(settings, tmp_path / "run")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "is"}')
    with pytest.raises(ConfigError, match="tokenizer"):
        train(settings, tmp_path / "run")
    shutil.rmtree(folder)
    model, _, loaded = sparsejax.load_model(tmp_path / "run")
    (ids,) = loaded.encode([b"3 plus 4 is 7"])
    assert ids.tolist() == [3, 406, 4, 407, 7] and loaded.separator == 408
    assert loaded.decode(ids) == b"3 plus 4 is 7"
    assert model(jnp.asarray(ids[None, :4], jnp.int32)).logits.shape == (1, 4, 409)


@pytest.mark.parametrize("kind", ["jsonl", "bin"])
def test_a_model_with_fewer_ids_than_the_tokenizer_is_refused(kind, tokenizer, tmp_path):
    folder, words = tokenizer
    source = write_jsonl(tmp_path) if kind == "jsonl" else write_bin(tmp_path, words)
    changes = {"data__source": source, "data__tokenizer": f"file:{folder}"}
    config = parse_config(make_settings(tmp_path, **_RUN | changes, model__vocab_size=408))
    message = (
        rf"vocab_size must be 0 or at least the 409 token ids of data\.source='{kind}:.*, got 4"
    )
    with pytest.raises(ConfigError, match=message):
        prepare_run(config)
    assert not (tmp_path / "data").exists()


def test_a_bad_line_is_named_before_anything_is_trained(tmp_path):
    source = write_jsonl(tmp_path)
    with (tmp_path / "set" / "sums.jsonl").open("a") as file:
        file.write("\n{")
    config = parse_config(make_settings(tmp_path, **_RUN, data__source=source))
    message = r"^data: /.*/sums\.jsonl, line 401 is not JSON \(.*\); expected one object a line$"
    with pytest.raises(ConfigError, match=message):
        prepare_run(config)
