"""Pruning without training: what layers read is measured right, and masks keep what matters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.calibration import (
    choose_mask,
    collect_statistics,
    prune,
    score_weights,
)
from sparsejax.masks import magnitude_nm_mask, transposable_mask
from sparsejax.models import SparsityMask, Transformer
from sparsejax.patterns import NMPattern, Unstructured, WeightBlocks
from tests.small_models import make_config

TOKENS = np.random.default_rng(1).integers(0, 17, (4, 16), np.int32)
PATTERNS = {
    "2:4": NMPattern(),
    "2:4 transposable": NMPattern(2, 4, transposable=True),
    "unstructured": Unstructured(),
    "4x4": WeightBlocks(4, 4),
}


@functools.cache
def make_model(**changes):
    """Weights that NumPy draws; norms scale features, so that some matter more than others."""
    model = nnx.eval_shape(lambda: Transformer(make_config(**changes), rngs=nnx.Rngs(0)))
    graphdef, *variables = nnx.split(model, nnx.Param, SparsityMask)
    params, masks = (nnx.to_pure_dict(part) for part in variables)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.float32(rng.normal(0, 0.5, x.shape)), params)
    masks = jax.tree.map(lambda x: jnp.ones(x.shape, bool), masks)
    return nnx.merge(graphdef, params, masks)


def read_inputs(model, tokens):
    """What every linear layer reads, computed in NumPy: name -> [L, B * T, K]."""
    params = jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    x = params["embedding"]["embedding"][tokens] + params["position"]
    found = {name: [] for name in ("attention/qkv", "attention/out", "mlp/up", "mlp/down")}

    def normalise(x, norm):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * norm["scale"] + norm["bias"]

    def multiply(block, name, x):
        found[name].append(x.reshape(-1, x.shape[-1]))
        branch, layer = name.split("/")
        return x @ block[branch][layer]["kernel"] + block[branch][layer]["bias"]

    for i in range(2):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        qkv = multiply(block, "attention/qkv", normalise(x, block["attention_norm"]))
        q, k, v = qkv.reshape(*tokens.shape, 3, 2, 8).transpose(2, 0, 3, 1, 4)
        logits = np.where(np.tri(16, dtype=bool), q @ k.swapaxes(-1, -2) / np.sqrt(8), -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        y = (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(1, 2).reshape(x.shape)
        x = x + multiply(block, "attention/out", y)
        z = multiply(block, "mlp/up", normalise(x, block["mlp_norm"]))
        hidden = z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))) / 2
        x = x + multiply(block, "mlp/down", hidden)
    return {name: np.stack(inputs) for name, inputs in found.items()}


def test_statistics_over_batches_are_those_of_all_inputs():
    model = make_model(sparse_weights=(("mlp/.*", NMPattern()),))
    statistics = collect_statistics(model, (TOKENS[:2], TOKENS[2:]))
    inputs = read_inputs(model, TOKENS)
    assert statistics.count == TOKENS.size
    assert set(statistics.norms) == set(inputs)
    for name, norms_LK in statistics.norms.items():
        expected = np.sqrt((inputs[name] ** 2).mean(1))
        np.testing.assert_allclose(norms_LK, expected, rtol=2e-5, err_msg=name)


def test_scores_are_magnitudes_times_the_norm_of_the_feature():
    model = make_model(sparse_weights=(("mlp/.*", NMPattern()),))
    w_LKN = np.abs(model.blocks.mlp.up.kernel[...])
    magnitudes = score_weights(model)
    assert list(magnitudes) == ["mlp/up", "mlp/down"]
    np.testing.assert_array_equal(magnitudes["mlp/up"], w_LKN)
    norms = {name: jnp.ones(x.shape[:2]) for name, x in magnitudes.items()}
    np.testing.assert_array_equal(score_weights(model, norms)["mlp/up"], w_LKN)
    norms["mlp/up"] = norms["mlp/up"].at[1, 5].set(100.0)
    expected = w_LKN.copy()
    expected[1, 5] *= 100
    np.testing.assert_array_equal(score_weights(model, norms)["mlp/up"], expected)


def check_unstructured(kept_LKN, scores_LKN):
    """Half of each column, and nothing that is dropped is above what is kept."""
    assert (kept_LKN.sum(1) == 8).all()
    lowest = np.where(kept_LKN, scores_LKN, np.inf).min(1)
    assert (np.where(kept_LKN, 0, scores_LKN).max(1) <= lowest).all()


def check_blocks(kept_LIJ, scores_LKN):
    sums = scores_LKN.reshape(2, 4, 4, 2, 4).sum((2, 4))
    for kept, score in zip(kept_LIJ, sums, strict=True):
        assert set(np.flatnonzero(kept)) == set(np.argsort(score.ravel())[4:])


@pytest.mark.parametrize(
    "pattern",
    ["2:4", *(pytest.param(p, marks=pytest.mark.ci) for p in PATTERNS if p != "2:4")],
)
def test_masks_keep_the_highest_scores_that_a_pattern_allows(pattern):
    scores = np.random.default_rng(2).gamma(1.0, size=(2, 16, 8)).astype(np.float32)
    scores[:, 6] *= 100
    density = None if isinstance(PATTERNS[pattern], NMPattern) else 0.5
    kept = np.asarray(choose_mask(jnp.asarray(scores), PATTERNS[pattern], density))
    if pattern == "4x4":
        check_blocks(kept, scores)
        # Every block with the large feature.
        assert kept[:, 1].all()
    elif pattern == "unstructured":
        check_unstructured(kept, scores)
        assert kept[:, 6].all()
    elif pattern == "2:4":
        np.testing.assert_array_equal(kept, magnitude_nm_mask(scores, axis=1))
        assert kept[:, 6].all()
    else:
        np.testing.assert_array_equal(kept, transposable_mask(jnp.asarray(scores)))
        assert (kept.reshape(2, 4, 4, 8).sum(2) == 2).all()
        assert (kept.reshape(2, 16, 2, 4).sum(3) == 2).all()


@pytest.mark.ci
def test_pruning_changes_masks_alone():
    weights = (("mlp/up", NMPattern()), ("mlp/down", WeightBlocks(4, 4)))
    model = make_model(sparse_weights=weights)
    pruned = prune(model, [TOKENS], density=0.25)
    norms = {k: np.sqrt((x**2).mean(1)) for k, x in read_inputs(model, TOKENS).items()}
    scores = np.abs(model.blocks.mlp.up.kernel[...]) * norms["mlp/up"][..., None]
    before, after = (
        nnx.to_pure_dict(nnx.state(m, SparsityMask))["blocks"] for m in (model, pruned)
    )
    assert jax.tree.all(jax.tree.map(np.all, before))
    np.testing.assert_array_equal(
        after["mlp"]["up"]["kernel_mask"], magnitude_nm_mask(jnp.float32(scores), axis=1)
    )
    assert (after["mlp"]["down"]["kernel_mask"].sum((1, 2)) == 8).all()
    old, new = (nnx.state(m, nnx.Param) for m in (model, pruned))
    jax.tree.map(np.testing.assert_array_equal, old, new)


@pytest.mark.parametrize(
    ("weights", "batches", "density", "message"),
    [
        ((), [TOKENS], None, "sparse_weights must name the weights to prune, got none"),
        ((("embedding", Unstructured()),), [TOKENS], 0.5, "weights to prune must be of"),
        ((("mlp/up", Unstructured()),), [TOKENS], None, "density must be in (0, 1]"),
        ((("mlp/up", Unstructured()),), [TOKENS], 1.5, "got 1.5"),
        ((("mlp/up", NMPattern()),), [TOKENS], 0.5, "density must be None for '2:4' weights"),
        ((("mlp/up", NMPattern(1, 4, True)),), [TOKENS], None, "must be 2:4"),
        ((("mlp/up", NMPattern()),), [], None, "batches must hold at least one"),
    ],
)
def test_what_cannot_be_pruned_is_refused(weights, batches, density, message):
    with pytest.raises(ValueError) as error:
        prune(make_model(sparse_weights=weights), batches, density=density)
    assert message in str(error.value)


@pytest.mark.ci
def test_inputs_that_are_not_finite_are_refused():
    model = make_model(sparse_weights=(("mlp/up", NMPattern()),))
    graphdef, params, masks = nnx.split(model, nnx.Param, SparsityMask)
    plain = nnx.to_pure_dict(params)
    plain["blocks"]["mlp_norm"]["scale"] = plain["blocks"]["mlp_norm"]["scale"].at[1].set(jnp.inf)
    with pytest.raises(ValueError, match=r"'mlp/down' reads must be finite.* layers \[1\]"):
        collect_statistics(nnx.merge(graphdef, plain, masks), [TOKENS])
