"""What goes into a model and comes out of it: patches, masked tokens, biases, normalised sums.

And what its linear layers begin as where `linear_init` says so.
"""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from sparsejax.models import Transformer
from tests.models.test_transformer import (
    DECODER,
    DENSE,
    ENCODER,
    LENGTH,
    MASKED,
    apply,
    assert_close,
    forward,
    jit,
    make_tokens,
    make_weights,
    split_abstract,
)

MASKED_LM = dataclasses.replace(DECODER, causal=False)
CLASSIFIER = dataclasses.replace(ENCODER, positions="learned")
PATCHES = dataclasses.replace(CLASSIFIER, vocab_size=0, patch_values=12)


@pytest.mark.parametrize(
    "options", [DENSE, pytest.param(MASKED, marks=pytest.mark.ci)], ids=["dense", "sparse"]
)
def test_an_encoder_that_models_language_sees_both_sides(options):
    params, masks = make_weights(MASKED_LM)
    assert "classifier" not in params
    tokens = make_tokens(2, LENGTH)
    changed = tokens.copy()
    changed[:, 38] = (changed[:, 38] + 1) % MASKED_LM.vocab_size
    run = forward(MASKED_LM, options)
    before, after = run(params, masks, tokens), run(params, masks, changed)
    assert before.shape == (2, LENGTH, MASKED_LM.vocab_size)
    moved = np.abs(before - after).max((0, 2)) > 1e-3
    assert moved[:38].all() and moved[39:].all()


def test_a_patch_is_the_look_up_of_its_linear_image():
    params, masks = make_weights(PATCHES)
    kernel, bias = params["patches"]["kernel"], params["patches"]["bias"]
    values = np.random.default_rng(0).integers(0, 256, (32, 12), np.uint8)
    values[0], values[1] = 0, 255
    table = (values / 127.5 - 1) @ kernel + bias
    assert_close(table[0] + table[1], 2 * bias)
    by_token = {name: value for name, value in params.items() if name != "patches"}
    by_token["embedding"] = {"embedding": np.float32(table)}
    tokens = make_tokens(2, LENGTH)
    real = np.arange(LENGTH) < np.array([[45], [64]])
    expected = forward(CLASSIFIER, DENSE)(by_token, masks, tokens, real)
    assert_close(forward(PATCHES, DENSE)(params, masks, values[tokens], real), expected)
    assert_close(forward(PATCHES, MASKED)(params, masks, values[tokens], real), expected)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("config", "norms_too"), [(MASKED_LM, True), (PATCHES, False)], ids=["tokens", "patches"]
)
def test_without_biases_a_model_is_one_whose_biases_are_zero(config, norms_too):
    plain = dataclasses.replace(config, use_bias=False, use_norm_bias=not norms_too)
    params, masks = make_weights(config)

    def is_bias(path):
        names = [part.key for part in path]
        return names[-1] == "bias" and (norms_too or not any("norm" in name for name in names))

    zeroed = jax.tree.map_with_path(lambda path, x: x * (not is_bias(path)), params)
    names = {path for path, _ in jax.tree.leaves_with_path(split_abstract(plain)[1])}
    assert names == {path for path, _ in jax.tree.leaves_with_path(params) if not is_bias(path)}
    without = {path: x for path, x in jax.tree.leaves_with_path(zeroed) if not is_bias(path)}
    without = jax.tree.map_with_path(lambda path, _: without[path], split_abstract(plain)[1])
    inputs = make_tokens(2, LENGTH)
    if config.patch_values:
        inputs = np.random.default_rng(0).integers(0, 256, (2, LENGTH, 12), np.uint8)
    got = forward(plain, DENSE)(without, masks, inputs)
    assert_close(got, forward(config, DENSE)(zeroed, masks, inputs))
    assert np.abs(got - forward(config, DENSE)(params, masks, inputs)).max() > 1e-2


@pytest.mark.ci
def test_a_normalised_sum_of_embedding_and_position_has_no_scale():
    normalised = dataclasses.replace(CLASSIFIER, embedding_norm=True)
    tokens = make_tokens(2, LENGTH)

    def change(config, factor):
        params, masks = make_weights(config)
        louder = params | {
            name: jax.tree.map(lambda x: factor * x, params[name])
            for name in ("embedding", "position")
        }
        run = forward(config, DENSE)
        return np.abs(run(louder, masks, tokens) - run(params, masks, tokens)).max()

    assert change(normalised, 3) < 1e-2
    assert change(CLASSIFIER, 3) > 0.1


@pytest.mark.parametrize(
    "shape", [(2, LENGTH), (2, LENGTH, 11), (2, LENGTH + 1, 12), (2, 1, 4, 12)]
)
def test_patches_of_another_shape_are_refused(shape):
    params, masks = make_weights(PATCHES)
    expected = r"tokens must be \[B, T, 12\] with T at most max_length=64, got shape"
    with pytest.raises(ValueError, match=expected):
        apply(PATCHES, DENSE, params, masks, np.zeros(shape, np.uint8))


def test_documents_to_match_come_in_twos():
    towers = dataclasses.replace(ENCODER, num_towers=2)
    params, masks = make_weights(towers)
    with pytest.raises(ValueError, match=r"tokens must be \[B, 2, T\] .* got shape \(1, 3, 64\)"):
        apply(towers, DENSE, params, masks, np.zeros((1, 3, LENGTH), np.int32))


@pytest.mark.ci
def test_initialisation_of_torch_is_uniform_within_the_root_of_the_inputs():
    config = dataclasses.replace(
        ENCODER, linear_init="torch", positions="learned", model_dim=64, mlp_dim=96, num_towers=2
    )

    @jit
    def init(key):
        model = Transformer(config, rngs=nnx.Rngs(params=key))
        return nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[1])

    params = init(jax.random.key(0))
    layers = {
        "qkv": (params["blocks"]["attention"]["qkv"], 64),
        "out": (params["blocks"]["attention"]["out"], 64),
        "up": (params["blocks"]["mlp"]["up"], 64),
        "down": (params["blocks"]["mlp"]["down"], 96),
        "hidden": (params["hidden"], 4 * 64),
        "classifier": (params["classifier"], 96),
    }
    for name, (layer, inputs) in layers.items():
        bound = inputs**-0.5
        assert np.abs(layer["kernel"]).max() == pytest.approx(bound, rel=0.02), name
        assert layer["kernel"].std() == pytest.approx(bound / 3**0.5, rel=0.05), name
        # Three classes have three biases.
        size = np.abs(layer["bias"])
        assert size.min() > 0 and size.max() <= bound, name
        assert size.max() > 0.9 * bound or size.size < 10, name
    for table in (params["embedding"]["embedding"], params["position"]):
        assert table.std() == pytest.approx(0.02, rel=0.05)
