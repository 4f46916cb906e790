"""Runs that begin with pretrained weights begin with just those, or are refused."""

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sparsejax.config.parse import ConfigError, parse_config
from sparsejax.pretrained import export_hf, load_pretrained
from sparsejax.pretrained.leaves import flatten
from sparsejax.tools.load import load_model
from sparsejax.training.initial import check_initial, create_initial_state
from sparsejax.training.setup import prepare_run
from tests.pretrained.folders import assert_same_bits, load_golden, read_params
from tests.pretrained.make_golden import GOLDEN
from tests.sharding.eight_devices import run_program
from tests.training.runs import make_settings, train

_MODEL = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_dim": 48,
    "vocab_size": 80,
    "mlp_activation": "swiglu",
    "norm": "rms",
    "positions": "rotary",
    "dropout_rate": 0.0,
    "block_size": 8,
}


def make_initial_settings(folder, init_from, **changes):
    """Return settings of a run that starts from a golden model of Llama's shape."""
    (folder / "words.txt").write_text("the cat and the hat. the other bat. " * 200)
    model = {f"model__{name}": value for name, value in _MODEL.items()}
    return make_settings(
        folder,
        **model
        | {
            "num_steps": 2,
            "model__init_from": str(init_from),
            "data__source": f"text:{folder / 'words.txt'}",
            "data__tokenizer": f"file:{GOLDEN / 'llama_tied'}",
            "data__sequence_length": 16,
            "recipe__name": "dense",
        }
        | changes,
    )


@pytest.mark.ci
def test_a_run_starts_from_the_weights_and_goes_on_without_them(tmp_path):
    weights = shutil.copytree(GOLDEN / "llama_tied", tmp_path / "weights")
    settings = make_initial_settings(tmp_path, weights)
    run = prepare_run(parse_config(settings))
    found = flatten(create_initial_state(run).params)
    expected = read_params(load_golden("llama_tied").model)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, path)
    workdir = tmp_path / "run"
    train(settings | {"num_steps": 1, "schedule_steps": 2}, workdir)
    shutil.rmtree(weights)
    train(settings, workdir)
    recorded = json.loads((workdir / "checkpoints" / "run.json").read_text())
    assert recorded["config"]["model"]["init_from"] == str(weights)
    # Two steps away at most: weights that were drawn would differ by tenths.
    for path, value in read_params(load_model(workdir).model).items():
        assert 0 < np.abs(value - expected[path]).max() < 0.01, path
    trained = load_model(workdir)
    export_hf(trained, tmp_path / "exported")
    assert_same_bits(load_pretrained(tmp_path / "exported", block_size=8).model, trained.model)
    assert (
        load_pretrained(tmp_path / "exported", block_size=8).tokenizer.name
        == trained.tokenizer.name
    )
    with pytest.raises(ConfigError, match="which does not exist"):
        train(settings, tmp_path / "other")


@pytest.mark.slow
def test_each_device_holds_its_part_of_the_weights(tmp_path):
    found = run_program("tests.training.initial_on_mesh", str(tmp_path))
    assert found == {"wrong": [], "held": 1 / 4}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model__norm": "layer"}, "model.norm must be 'rms' as in {folder}, got 'layer'"),
        ({"model__num_kv_heads": 0}, "model.num_kv_heads must be 2 as in {folder}, got 4"),
        ({"model__rotary_wavelength": 5e5}, "model.rotary_wavelength must be 10000.0 as in"),
        ({"model__vocab_size": 96}, "model.vocab_size must be 80 as in {folder}, got 96"),
        ({"data__sequence_length": 128}, "data.sequence_length must be at most 64, the context"),
    ],
)
def test_settings_that_are_not_those_of_the_weights_are_refused(tmp_path, changes, message):
    folder = GOLDEN / "llama_tied"
    settings = parse_config(make_initial_settings(tmp_path, folder, **changes))
    message = f"model.init_from: {message.format(folder=folder)}"
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_initial(settings, tmp_path / "checkpoints")


def test_data_that_are_not_those_of_the_weights_are_refused(tmp_path):
    other = tmp_path / "tokenizer"
    other.mkdir()
    text = (GOLDEN / "llama_tied" / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(
        text.replace('"a": 2', '"a": 3').replace('"b": 3', '"b": 2')
    )
    settings = make_initial_settings(
        tmp_path, GOLDEN / "llama_tied", data__tokenizer=f"file:{other}", model__vocab_size=0
    )
    run = prepare_run(parse_config(settings))
    with pytest.raises(ConfigError, match="model.vocab_size must be 80 as in .*, got 32"):
        create_initial_state(run)
    run = prepare_run(parse_config(settings | {"model": settings["model"] | {"vocab_size": 80}}))
    with pytest.raises(ConfigError, match="in which id 2 is b'a', got .* in which it is b'b'"):
        create_initial_state(run)


@pytest.mark.ci
def test_tensors_that_do_not_fit_are_refused(tmp_path):
    weights = shutil.copytree(GOLDEN / "llama_tied", tmp_path / "weights")
    tensors = load_file(weights / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, weights / "model.safetensors")
    run = prepare_run(parse_config(make_initial_settings(tmp_path, weights)))
    with pytest.raises(ConfigError, match="must hold the tensor 'model.norm.weight'"):
        create_initial_state(run)
