"""Transformers with sparse weights: which they are, and that they are what their masks say."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.doctor.oracles import make_nm_masks
from sparsejax.models import (
    DENSE_LINEAR,
    LinearOptions,
    SparsityMask,
    Transformer,
    products,
    sparse_weight_patterns,
)
from sparsejax.patterns import NMPattern
from tests.small_models import make_config

SPARSE, SQUARE = LinearOptions(), NMPattern(2, 4, transposable=True)
MVUE = LinearOptions(grad_pruning="mvue")
CONFIG = make_config(
    vocab_size=11,
    num_kv_heads=1,
    mlp_dim=24,
    mlp_activation="geglu",
    sparse_weights=(("mlp/.*", SQUARE), ("attention/out", NMPattern())),
)
TOKENS = np.arange(32).reshape(2, 16) % 11

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def split_abstract(config):
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    graphdef, params, masks = nnx.split(model, nnx.Param, SparsityMask)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(masks)


def make_weights(config, *, prunes=True):
    """Random parameters, and masks that differ between layers."""
    _, params, masks = split_abstract(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.float32(rng.normal(0, 0.3, x.shape)), params)

    def make_mask(path, mask):
        if not prunes or path[-1].key != "kernel_mask":
            return np.ones(mask.shape, bool)
        make = functools.partial(make_nm_masks, mask.shape[1:], (2, 4), transposable=True)
        return np.stack([make(seed=i)["whole"] for i in range(len(mask))])

    return params, jax.tree.map_with_path(make_mask, masks)


def apply(config, options, params, masks, key=None):
    model = nnx.merge(split_abstract(config)[0], params, masks)
    return model(TOKENS, linear_options=options, pruning_key=key).logits


@functools.cache
def forward(config, options):
    return jit(lambda params, masks: apply(config, options, params, masks))


@functools.cache
def gradient(config, options):
    def compute(params, masks, key):
        return (apply(config, options, params, masks, key) ** 2).sum()

    return jit(jax.grad(compute))


def multiply(params, masks):
    """Zeros where a weight is pruned."""
    flat = {
        path[:-1]: mask
        for path, mask in jax.tree.leaves_with_path(masks)
        if path[-1].key == "kernel_mask"
    }

    def prune(path, x):
        return x * flat[path[:-1]] if path[-1].key == "kernel" and path[:-1] in flat else x

    return jax.tree.map_with_path(prune, params)


def test_masks_stand_beside_the_weights_they_prune():
    _, params, masks = split_abstract(CONFIG)
    masked = {
        jax.tree_util.keystr(path[:-1], simple=True, separator="/"): mask.shape
        for path, mask in jax.tree.leaves_with_path(masks)
        if path[-1].key == "kernel_mask"
    }
    assert masked == {
        "blocks/attention/out": (2, 16, 16),
        "blocks/mlp/up": (2, 16, 48),
        "blocks/mlp/down": (2, 24, 16),
    }
    for name, shape in masked.items():
        layer = functools.reduce(lambda tree, part: tree[part], name.split("/"), params)
        assert layer["kernel"].shape == shape
    assert "kernel_mask" not in str(jax.tree.structure(params))
    dense = dataclasses.replace(CONFIG, sparse_weights=())
    assert jax.tree.map(jnp.shape, split_abstract(dense)[1]) == jax.tree.map(jnp.shape, params)


@pytest.mark.ci
def test_a_model_is_initialised_alike_with_and_without_masks():
    def init(config):
        model = Transformer(config, rngs=nnx.Rngs(0))
        _, params, masks = nnx.split(model, nnx.Param, SparsityMask)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(masks)

    dense = dataclasses.replace(CONFIG, sparse_weights=())
    (params, masks), (plain_params, _) = (jit(init, static_argnums=0)(c) for c in (CONFIG, dense))
    jax.tree.map(np.testing.assert_array_equal, params, plain_params)
    assert all(mask.all() for mask in jax.tree.leaves(masks))


@pytest.mark.ci
def test_a_pruned_model_is_the_model_of_pruned_weights():
    params, masks = make_weights(CONFIG)
    logits = forward(CONFIG, SPARSE)(params, masks)
    expected = forward(CONFIG, DENSE_LINEAR)(multiply(params, masks), masks)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    for name in ("mlp/up", "mlp/down", "attention/out"):
        branch, layer = name.split("/")
        full = {"kernel_mask": np.ones_like(masks["blocks"][branch][layer]["kernel_mask"])}
        changed = masks["blocks"] | {branch: masks["blocks"][branch] | {layer: full}}
        other = forward(CONFIG, SPARSE)(params, {"blocks": changed})
        assert np.abs(other - logits).max() > 1e-2, f"the mask of {name} does nothing"


@pytest.mark.ci
def test_the_dense_mode_is_the_model_without_masks_bit_for_bit():
    params, masks = make_weights(CONFIG)
    dense = dataclasses.replace(CONFIG, sparse_weights=())
    plain_masks = make_weights(dense)[1]
    np.testing.assert_array_equal(
        forward(CONFIG, DENSE_LINEAR)(params, masks), forward(dense, SPARSE)(params, plain_masks)
    )
    got = gradient(CONFIG, DENSE_LINEAR)(params, masks, None)
    expected = gradient(dense, SPARSE)(params, plain_masks, None)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.ci
@pytest.mark.parametrize(
    "change",
    [pytest.param({"scan_layers": False}, marks=pytest.mark.slow), {"remat": True}],
    ids=str,
)
def test_unrolled_and_recomputed_layers_draw_the_same(change):
    params, masks = make_weights(CONFIG)
    other = dataclasses.replace(CONFIG, **change)
    key = jax.random.key(0)
    expected = gradient(CONFIG, MVUE)(params, masks, key)
    got = gradient(other, MVUE)(params, masks, key)

    def check(a, b):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())

    jax.tree.map(check, got, expected)
    otherwise = gradient(CONFIG, MVUE)(params, masks, jax.random.key(1))
    one, two = (grads["blocks"]["mlp"]["down"]["kernel"] for grads in (expected, otherwise))
    assert (np.abs(one - two).max((1, 2)) > 0.1 * np.abs(one).max((1, 2))).all()


@pytest.mark.ci
@pytest.mark.parametrize("scan_layers", [True, False])
def test_every_layer_draws_with_a_key_of_its_own(scan_layers, monkeypatch):
    seen = collections.defaultdict(set)

    def record(x, w, mask, *, key, **options):
        add = functools.partial(lambda shape, data: seen[shape].add(tuple(data.tolist())), w.shape)
        jax.debug.callback(add, jax.random.key_data(key))
        return multiply_weights(x, w, mask, key=key, **options)

    def look(config):
        seen.clear()
        params, masks = make_weights(config)
        jax.block_until_ready(apply(config, MVUE, params, masks, jax.random.key(0)))
        jax.effects_barrier()
        return {shape: frozenset(keys) for shape, keys in seen.items()}

    multiply_weights = products.nm_matmul
    monkeypatch.setattr(products, "nm_matmul", record)
    config = dataclasses.replace(CONFIG, scan_layers=scan_layers)
    keys = look(config)
    assert {shape: len(found) for shape, found in keys.items()} == {
        (16, 48): 2,
        (24, 16): 2,
        (16, 16): 2,
    }
    assert len(frozenset.union(*keys.values())) == 6
    # Whether another layer is sparse is none of its business.
    alone = dataclasses.replace(config, sparse_weights=(("mlp/down", SQUARE),))
    assert look(alone) == {(24, 16): keys[24, 16]}


def test_a_pruning_key_is_asked_for_where_something_is_drawn():
    params, masks = make_weights(CONFIG)
    with pytest.raises(ValueError, match="pruning_key must be given where grad_pruning='mvue'"):
        jax.eval_shape(functools.partial(apply, CONFIG, MVUE), params, masks)
    dense = dataclasses.replace(CONFIG, sparse_weights=())
    for config, options, key in (
        (dense, MVUE, None),
        (CONFIG, MVUE._replace(sparse=False), None),
        (CONFIG, SPARSE, jax.random.key(0)),
    ):
        jax.eval_shape(functools.partial(apply, config, options), *make_weights(config), key)


def test_the_first_pattern_that_matches_all_of_a_name_decides():
    patterns = (
        ("mlp", NMPattern(1, 8)),
        ("attention/qkv|mlp", NMPattern(1, 2)),
        ("mlp/up", NMPattern(1, 4)),
        ("mlp/.*", NMPattern()),
        (".*/(out|down)", SQUARE),
    )
    with pytest.raises(ValueError, match="but 'mlp' matches none"):
        dataclasses.replace(CONFIG, sparse_weights=patterns)
    config = dataclasses.replace(CONFIG, sparse_weights=patterns[1:])
    found = sparse_weight_patterns(config)
    assert found == {
        "attention/qkv": NMPattern(1, 2),
        "attention/out": SQUARE,
        "mlp/up": NMPattern(1, 4),
        "mlp/down": NMPattern(),
    }
    config = dataclasses.replace(config, sparse_weights=patterns[2:])
    found = sparse_weight_patterns(config)
    assert "attention/qkv" not in found
    assert sparse_weight_patterns(dataclasses.replace(config, sparse_weights=())) == {}
    blocks = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))).blocks
    for branch in ("attention", "mlp"):
        for name in ("qkv", "out") if branch == "attention" else ("up", "down"):
            layer = getattr(getattr(blocks, branch), name)
            assert getattr(layer, "pattern", None) == found.get(f"{branch}/{name}")
