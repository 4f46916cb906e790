"""What is exported is what was trained, pruned weights as zeros."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from sparsejax.models import AttentionOptions, make_transformer
from sparsejax.patterns import NMPattern, Unstructured, WeightBlocks
from sparsejax.pretrained import export_hf, load_pretrained, read_masks
from sparsejax.pretrained.families import match_family
from tests.pretrained.folders import assert_same_bits, load_golden, read_params
from tests.pretrained.make_golden import GOLDEN, NAMES

_SPARSE = (
    ("mlp/up", NMPattern()),
    ("mlp/down", Unstructured()),
    ("attention/out", WeightBlocks(8, 16)),
    ("embedding", Unstructured()),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_comes_back_bit_for_bit(tmp_path, name):
    golden = load_golden(name)
    export_hf(golden, tmp_path / "model")
    back = load_pretrained(tmp_path / "model")
    assert back.config == golden.config
    assert_same_bits(back.model, golden.model)
    if golden.tokenizer is not None:
        assert back.tokenizer.name == golden.tokenizer.name
    assert not (tmp_path / "model" / "masks.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_same_tensors_are_written(tmp_path):
    """But for the kinds of tokens of BERT, whose sum with the positions stays as it is."""
    for name in ("llama_tied", "bert"):
        export_hf(load_golden(name), tmp_path / name)
        original = load_file(GOLDEN / name / "model.safetensors")
        written = load_file(tmp_path / name / "model.safetensors")
        assert written.keys() == original.keys()
        for key, value in written.items():
            if "position" not in key and "token_type" not in key:
                np.testing.assert_array_equal(value, original[key], key)


def test_pruned_weights_are_zeros_beside_their_masks(tmp_path):
    model = make_pruned().model
    params = read_params(model)
    masks = {
        "blocks.mlp.up.kernel_mask": model.blocks.mlp.up.kernel_mask[...],
        "blocks.mlp.down.kernel_mask": model.blocks.mlp.down.kernel_mask[...],
        "blocks.attention.out.kernel_mask": model.blocks.attention.out.kernel_mask[...],
        "embedding.embedding_mask": model.embedding.embedding_mask[...],
    }
    export_hf(model, tmp_path / "sparse", dtype="bfloat16")
    found = read_masks(tmp_path / "sparse")
    assert found.keys() == masks.keys()
    written = read_params(load_pretrained(tmp_path / "sparse").model)
    for path, value in params.items():
        expected = value.astype(jnp.bfloat16).astype(np.float32)
        if f"{path}_mask" in masks:
            mask = np.asarray(masks[f"{path}_mask"])
            np.testing.assert_array_equal(found[f"{path}_mask"], mask)
            if "attention" in path:
                mask = np.kron(mask, np.ones((8, 16), bool))
            assert not mask.all()
            expected = np.where(mask, expected, 0)
        np.testing.assert_array_equal(written[path], expected, path)


def test_what_a_model_ignores_is_not_pruned(tmp_path):
    model = make_pruned().model
    model.linear_options = model.linear_options._replace(sparse=False)
    model.attention_options = AttentionOptions()
    model.blocks.attention.block_mask[...] = model.blocks.attention.block_mask[...].at[0].set(False)
    export_hf(model, tmp_path / "dense")
    found = read_masks(tmp_path / "dense")
    assert found.keys() == {"blocks.attention.block_mask"}
    np.testing.assert_array_equal(
        found["blocks.attention.block_mask"], model.blocks.attention.block_mask[...]
    )
    assert_same_bits(load_pretrained(tmp_path / "dense").model, load_golden("llama_tied").model)


@pytest.mark.ci
def test_a_pruned_model_computes_the_same_without_masks(tmp_path):
    model = make_pruned().model
    export_hf(model, tmp_path / "sparse")
    dense = load_pretrained(tmp_path / "sparse").model
    tokens = jnp.arange(20)[None]
    expected = jax.jit(lambda tokens: model(tokens).logits)(tokens)
    assert np.abs(expected - load_golden("llama_tied").model(tokens).logits).max() > 0.1
    np.testing.assert_allclose(dense(tokens).logits, expected, atol=1e-5)


def test_a_gpt2_without_biases_gets_zeros(tmp_path):
    config = dataclasses.replace(
        load_golden("gpt2").config, num_layers=1, use_bias=False, use_norm_bias=False
    )
    model = nnx.eval_shape(lambda: make_transformer(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    draw = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: jnp.asarray(draw.random(leaf.shape), leaf.dtype), state)
    model = nnx.merge(graphdef, state)
    export_hf(model, tmp_path / "model")
    written = load_pretrained(tmp_path / "model")
    assert written.config.use_bias and written.config.use_norm_bias
    params = read_params(model)
    for path, value in read_params(written.model).items():
        np.testing.assert_array_equal(value, params.get(path, np.zeros_like(value)), path)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        (
            "llama_tied",
            {"mlp_activation": "geglu"},
            "mlp_activation must be 'swiglu' to be written",
        ),
        ("llama_tied", {"norm": "layer"}, "norm must be 'rms'"),
        ("llama_tied", {"own_class": "mine:Model"}, "own_class must be ''"),
        ("gpt2", {"mlp_activation": "geglu"}, "mlp_activation must be one of ('gelu', "),
        ("gpt2", {"num_kv_heads": 2}, "num_kv_heads must be 4"),
        ("gpt2", {"qkv_features": 64}, "qkv_features must be one of (0, 32)"),
        ("bert", {"num_classes": 10, "head_transform": False}, "num_classes must be 0"),
        ("bert", {"norm_position": "pre"}, "norm_position must be 'post'"),
        (
            "bert",
            {"num_decoder_layers": 2, "norm_position": "pre", "head_transform": False},
            "num_decoder_layers must be 0",
        ),
        (
            "bert",
            {"patch_values": 9, "vocab_size": 0, "num_classes": 2, "head_transform": False},
            "patch_values must be 0",
        ),
    ],
)
def test_models_that_transformers_does_not_have_are_refused(name, changes, message):
    config = dataclasses.replace(load_golden(name).config, **changes)
    with pytest.raises(ValueError, match=re.escape(f"model.{message}")):
        match_family(config)


def test_nothing_is_overwritten_and_nothing_left_behind(tmp_path, monkeypatch):
    golden = load_golden("llama_tied")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="folder must be new or empty"):
        export_hf(golden, tmp_path / "full")
    with pytest.raises(ValueError, match="expected a tokenizer.json"):
        export_hf(golden, tmp_path / "new", tokenizer=tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="dtype must be 'float32' or 'bfloat16', got 'int8'"):
        export_hf(golden, tmp_path / "new", dtype="int8")
    monkeypatch.setattr("sparsejax.pretrained.export.write_durably", _fail)
    with pytest.raises(OSError, match="disk full"):
        export_hf(golden, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def make_pruned():
    """Return a golden model with masks of every kind that a weight may have."""
    loaded = load_pretrained(GOLDEN / "llama_tied", block_size=16, sparse_weights=_SPARSE)
    blocks, draw = loaded.model.blocks, np.random.default_rng(0)
    up = blocks.mlp.up.kernel_mask
    # Two of each four along the inputs.
    up[...] = jnp.tile(jnp.array([True, False, False, True])[:, None], (2, 8, 96))
    for mask in (
        blocks.mlp.down.kernel_mask,
        blocks.attention.out.kernel_mask,
        loaded.model.embedding.embedding_mask,
    ):
        mask[...] = jnp.asarray(draw.random(mask[...].shape) < 0.5)
    return loaded


def _fail(*_):
    raise OSError("disk full")
