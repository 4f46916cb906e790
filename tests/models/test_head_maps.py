"""Maps and masks of single heads: probed, chosen from, attended with, and decoded with."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.models import AttentionOptions
from sparsejax.models.heads import measure_maps
from sparsejax.patterns import BlockPattern
from sparsejax.recipes import SpionConfig, get_attention_masks, make_spion
from sparsejax.training.state import enter_phase, make_graphdef
from tests.kernels.oracles import softmax_maps
from tests.small_models import (
    assert_same,
    make_batch,
    make_config,
    make_small_optimizer,
    make_state,
    make_step,
)

LENGTH, BLOCK = 32, 8
BLOCKS = LENGTH // BLOCK
MODEL = make_config(
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    max_length=LENGTH,
    block=BlockPattern(block_q=BLOCK, block_kv=BLOCK),
)
OPTIMIZER = make_small_optimizer()

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def pool(map_TS):
    return map_TS.reshape(BLOCKS, BLOCK, BLOCKS, BLOCK).sum((1, 3))


def test_the_map_of_each_query_head_is_pooled_beside_the_mean():
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(2, LENGTH, n, 4)).astype(np.float32) for n in (4, 2))
    real = np.arange(LENGTH) < np.array([[LENGTH], [LENGTH - 5]])
    measure = functools.partial(measure_maps, causal=True, pool_map=pool)
    mean, pooled = jit(measure)(q, k, real)
    visible = np.tri(LENGTH, dtype=bool) & real[:, None]
    maps = softmax_maps(q, np.repeat(k, 2, axis=2), visible).mean(0)
    np.testing.assert_allclose(mean, maps.mean(0), atol=1e-6)
    expected = maps.reshape(4, BLOCKS, BLOCK, BLOCKS, BLOCK).sum((2, 4))
    np.testing.assert_allclose(pooled, expected, atol=1e-5)
    assert np.abs(expected[0] - expected[1]).max() > 0.1


def make_recipe(**changes):
    settings = {
        "variant": "c",
        "density": 0.7,
        "filter_size": 1,
        "block_size": BLOCK,
        "num_layers": 1,
        "num_heads": 4,
        "length": LENGTH,
        "num_steps": 100,
        "causal": True,
        "pruned_logits": "masked",
    }
    return make_spion(SpionConfig(**settings | changes))


def set_heads(params):
    """Let heads look at the block before, their own, the first, and two blocks back.

    A position's embedding is its block's unit vector; both key heads tell the block, and queries
    ask for one.
    """
    D, H = MODEL.model_dim, MODEL.head_dim
    blocks = np.arange(LENGTH) // BLOCK
    kernel = np.zeros((1, D, 8 * H), np.float32)
    bias = np.zeros((1, 8 * H), np.float32)
    for i in range(BLOCKS):
        for head, looked_at in enumerate((max(i - 1, 0), i, None, max(i - 2, 0))):
            if looked_at is not None:
                kernel[0, i, head * H + looked_at] = 2
        for head in (4, 5):
            kernel[0, i, head * H + i] = 1
    bias[0, 2 * H] = 8
    kernel[:, :, 6 * H :] = np.random.default_rng(0).normal(size=(1, D, 2 * H))
    blocks_params = params["blocks"]
    qkv = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
    attention = blocks_params["attention"] | {"qkv": qkv}
    norm = {"scale": jnp.ones((1, D)), "bias": jnp.zeros((1, D))}
    return params | {
        # Tokens hardly count, but for the head, which is tied.
        "embedding": {"embedding": params["embedding"]["embedding"] / 100},
        "final_norm": jax.tree.map(lambda x: 100 * x, params["final_norm"]),
        "position": jnp.asarray(8 * np.eye(D, dtype=np.float32)[blocks]),
        "blocks": blocks_params | {"attention": attention, "attention_norm": norm},
    }


def switch(recipe):
    """Probe the model whose heads look at different blocks in a training step, and switch."""
    state = make_state(MODEL, recipe, OPTIMIZER)
    state = dataclasses.replace(state, params=set_heads(state.params))
    step = make_step(MODEL, recipe, OPTIMIZER, probes=True)
    new, *_ = step(state, make_batch(length=LENGTH))
    new = dataclasses.replace(new, params=state.params)
    return enter_phase(new, recipe, recipe.phases[1], OPTIMIZER)


@functools.partial(jax.jit, static_argnums=2)
def compute_logits(params, masks, sparse, tokens):
    model = nnx.merge(make_graphdef(MODEL), params, masks)
    return model(tokens, attention_options=AttentionOptions(sparse=sparse)).logits


@pytest.fixture(name="switched", scope="module")
def _switched():
    return switch(make_recipe(per_head=True))


@pytest.mark.ci
def test_heads_that_look_at_different_blocks_keep_those(switched):
    (kept,) = np.asarray(get_attention_masks(switched.sparsity.masks))
    own = np.eye(BLOCKS, dtype=bool)
    looked_at = {
        0: [(1, 0), (2, 1), (3, 2)],
        2: [(1, 0), (2, 0), (3, 0)],
        3: [(1, 0), (2, 0), (3, 1)],
    }
    for head, places in looked_at.items():
        expected = own.copy()
        expected[tuple(np.transpose(places))] = True
        np.testing.assert_array_equal(kept[head], expected)
    assert kept[1].sum() == 7 and np.diagonal(kept[1]).all()
    tokens, params = make_batch(length=LENGTH)["inputs"], switched.params
    masks = switched.sparsity.masks
    dense, sparse = (compute_logits(params, masks, x, tokens) for x in (False, True))
    assert np.abs(dense - sparse).max() < 1e-3
    together = switch(make_recipe()).sparsity.masks
    assert np.abs(dense - compute_logits(params, together, True, tokens)).max() > 0.1


@pytest.mark.ci
def test_decoding_keeps_the_blocks_of_each_head(switched):
    tokens = make_batch(length=LENGTH)["inputs"]
    masks = switched.sparsity.masks
    expected = compute_logits(switched.params, masks, True, tokens)
    model = nnx.merge(make_graphdef(MODEL), switched.params, masks)
    read, start = jit(lambda tokens: model.prefill(tokens)), 13
    _, cache = read(tokens[:, :start])
    decode = jit(lambda tokens, cache, positions: model.decode(tokens, cache, positions))
    for position in range(start, LENGTH):
        logits, cache = decode(tokens[:, position], cache, jnp.full(len(tokens), position))
        np.testing.assert_allclose(logits, expected[:, position], atol=1e-5)


@pytest.mark.ci
def test_a_step_that_probes_heads_trains_as_one_that_does_not():
    recipe = make_recipe(per_head=True)
    state, batch = make_state(MODEL, recipe, OPTIMIZER), make_batch(length=LENGTH)
    probed, *_ = make_step(MODEL, recipe, OPTIMIZER, probes=True)(state, batch)
    plain, _ = make_step(MODEL, recipe, OPTIMIZER)(state, batch)
    assert_same(probed.params, plain.params, atol=1e-6)
    mean = make_step(MODEL, make_recipe(), OPTIMIZER, probes=True)
    other, *_ = mean(make_state(MODEL, make_recipe(), OPTIMIZER), batch)
    maps = (x.sparsity.statistics["map_before"] for x in (probed, other))
    assert_same(*maps, atol=1e-6)
