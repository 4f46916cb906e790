"""Patterns of heads: what SPION and SAT make of the map of each head, on constructed maps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks import flood_reach, sat_pattern
from sparsejax.patterns import HeadMaps
from sparsejax.recipes import (
    SatConfig,
    SpionConfig,
    compute_attention_density,
    get_attention_masks,
    make_sat,
    make_spion,
)
from sparsejax.report.metrics import fetch_metrics

LAYERS, HEADS, LENGTH, BLOCK = 2, 3, 32, 4
BLOCKS = LENGTH // BLOCK
MASKS = {"block_mask": np.ones((LAYERS, 1, 1, BLOCKS, BLOCKS), bool), "other": np.ones(3, bool)}
SIZES = {
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "length": LENGTH,
    "block_size": BLOCK,
    "causal": True,
    "num_steps": 100,
}


def spion(**changes):
    settings = {"variant": "c", "density": 0.45, "filter_size": 1, "per_head": True}
    return make_spion(SpionConfig(**SIZES | settings | changes))


def sat(**changes):
    settings = {"density": 0.3, "head_dim": 4, "per_head": True}
    return make_sat(SatConfig(**SIZES | settings | changes))


def make_maps(recipe, seed=0):
    """Heads that look at the block before, at the first block, and two blocks back."""
    i, j = np.indices((LENGTH, LENGTH)) // BLOCK
    looked_at = np.stack([j == np.maximum(i - 1, 0), j == 0, j == np.maximum(i - 2, 0)])
    noise = np.random.default_rng(seed).random((LAYERS, HEADS, LENGTH, LENGTH))
    maps = np.tril(looked_at + 0.1 * noise).astype(np.float32)
    maps = jnp.asarray(maps / maps.sum(-1, keepdims=True))
    pooled = jax.vmap(jax.vmap(recipe.phases[0].pool_map))(maps)
    return maps, HeadMaps(maps.mean(1), pooled)


def begin(recipe):
    return recipe.init(MASKS, {}, jax.random.key(0))


def switch(recipe, sparsity):
    dense, sparse = recipe.phases
    return recipe.enter_phase(sparsity, sparse, previous=dense)


def test_each_head_keeps_the_blocks_that_it_looks_at_and_as_many_as_the_others():
    recipe = spion()
    sparsity = begin(recipe)
    assert sparsity.masks["block_mask"].shape == (LAYERS, 1, HEADS, BLOCKS, BLOCKS)
    np.testing.assert_array_equal(sparsity.masks["other"], MASKS["other"])
    _, maps = make_maps(recipe)
    sparsity, _ = jax.jit(recipe.observe, static_argnums=2)(sparsity, maps, recipe.phases[0])
    sparsity = switch(recipe, sparsity)
    kept = np.asarray(get_attention_masks(sparsity.masks))
    before, first, back = (np.zeros((BLOCKS, BLOCKS), bool) for _ in range(3))
    for i in range(BLOCKS):
        before[i, i - 1] = first[i, 0] = back[i, i - 2] = i > 1
    for layer in kept:
        for mask, looked_at in zip(layer, (before, first, back), strict=True):
            assert mask[looked_at].all() and np.diagonal(mask).all()
            assert mask.sum() == round(0.45 * BLOCKS * (BLOCKS + 1) / 2)
        assert not layer[0][first & ~before].all() and not layer[1][before & ~first].all()
    assert set(sparsity.statistics) == {"pooled"}


@pytest.mark.ci
@pytest.mark.parametrize("make", [spion, sat])
def test_the_switch_looks_at_the_mean_of_the_heads(make):
    heads, layers = make(), make(per_head=False)
    assert layers.phases[0] == heads.phases[0]._replace(pool_map=None)
    states = {recipe: begin(recipe) for recipe in (heads, layers)}
    told = []
    for seed in (0, 1, 2):
        _, maps = make_maps(heads, seed)
        for recipe, seen in ((heads, maps), (layers, maps.mean_TS)):
            observe = jax.jit(recipe.observe, static_argnums=2)
            states[recipe], observation = observe(states[recipe], seen, recipe.phases[0])
            told.append((bool(observation.change_phase), fetch_metrics(observation.metrics)))
    assert told[::2] == told[1::2]
    for recipe, shape in ((heads, (LAYERS, HEADS)), (layers, (LAYERS,))):
        assert states[recipe].statistics["pooled"].shape == (*shape, BLOCKS, BLOCKS)


@pytest.mark.ci
def test_a_walk_over_each_head_reaches_what_its_least_head_reaches():
    recipe = spion(variant="cf", density=1.0, walk="greedy")
    _, maps = make_maps(recipe)
    sparsity, _ = recipe.observe(begin(recipe), maps, recipe.phases[0])
    sparsity = switch(recipe, sparsity)
    values = fetch_metrics(recipe.phase_metrics(sparsity, recipe.phases[1]))
    reach = np.asarray(flood_reach(maps.pooled, causal=True, walk="greedy"))
    assert np.ptp(reach, axis=1).min() > 0
    np.testing.assert_allclose(values["reach"], reach.min(1), rtol=1e-6)
    kept = np.asarray(get_attention_masks(sparsity.masks)).sum((2, 3))
    np.testing.assert_allclose(kept / (BLOCKS * (BLOCKS + 1) / 2), reach, rtol=1e-6)
    density = compute_attention_density(sparsity.masks, causal=True)
    np.testing.assert_allclose(density, reach.mean(1), rtol=1e-6)
    assert "layers [0, 1] keep less" in recipe.phase_warnings(values)[0]


@pytest.mark.ci
def test_sat_fits_each_head_and_averages_over_them():
    recipe = sat()
    sparsity, (maps, probed) = begin(recipe), make_maps(recipe)
    pattern = sparsity.params["pattern"]
    assert pattern.shape == (LAYERS, HEADS, BLOCKS, 4)

    def loss(pattern, maps):
        changed = dataclasses.replace(sparsity, params={"pattern": pattern})
        return recipe.auxiliary_loss(changed, maps, recipe.phases[0])

    value, gradient = jax.value_and_grad(loss)(pattern, probed)
    pooled = np.asarray(maps).reshape(LAYERS, HEADS, BLOCKS, BLOCK, BLOCKS, BLOCK).mean((3, 5))
    visible = np.tri(BLOCKS)
    error = (np.einsum("lnid,lnjd->lnij", pattern, pattern) - pooled) * visible
    expected = 0.01 * LAYERS * (error**2).sum((2, 3)).mean(1).sum() / visible.sum()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    both = error + error.swapaxes(2, 3)
    expected = 0.02 * LAYERS / HEADS / visible.sum() * np.einsum("lnij,lnjd->lnid", both, pattern)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)
    seen, _ = recipe.observe(sparsity, probed, recipe.phases[0])
    between = recipe.auxiliary_loss(seen, None, recipe.phases[0])
    np.testing.assert_allclose(between, value, rtol=1e-6)


@pytest.mark.ci
def test_sat_keeps_the_blocks_of_each_heads_w_and_says_how_many_are_those_of_the_untrained():
    recipe = sat()
    sparsity = begin(recipe)
    untrained = sparsity.params["pattern"]
    # One head of the second layer has learned.
    learned = untrained.at[1, 2].set(np.random.default_rng(1).normal(size=untrained.shape[2:]))
    after = switch(recipe, dataclasses.replace(sparsity, params={"pattern": learned}))
    before, now = (sat_pattern(w, density=0.3, causal=True) for w in (untrained, learned))
    np.testing.assert_array_equal(get_attention_masks(after.masks), now)
    shares = recipe.phase_metrics(after, recipe.phases[1])["untrained_share"]
    same = np.asarray(before & now).sum((1, 2, 3)) / np.asarray(now).sum((1, 2, 3))
    np.testing.assert_allclose(shares, same, rtol=1e-6)
    assert shares[0] == 1 and 2 / 3 < shares[1] < 1


@pytest.mark.ci
def test_maps_of_heads_are_averaged_over_probes_too():
    recipe = sat(map_decay=0.75)
    sparsity, seen = begin(recipe), [make_maps(recipe, seed)[1] for seed in (0, 1)]
    for maps in seen:
        sparsity, _ = recipe.observe(sparsity, maps, recipe.phases[0])
    averaged = jax.tree.map(lambda first, second: 0.75 * first + 0.25 * second, *seen)
    np.testing.assert_allclose(sparsity.statistics["map_before"], averaged.mean_TS, rtol=1e-5)
    np.testing.assert_allclose(sparsity.statistics["pooled"], averaged.pooled, rtol=1e-5)


@pytest.mark.parametrize(("make", "name"), [(spion, "spion"), (sat, "sat")])
def test_patterns_of_heads_need_several(make, name):
    with pytest.raises(ValueError) as error:
        make(num_heads=1)
    assert (
        str(error.value) == f"recipe.{name}.per_head must be False in a model of one head, got True"
    )
    assert make(num_heads=1, per_head=False).phases
    with pytest.raises(ValueError, match=f"recipe.{name}.num_heads must be positive, got 0"):
        make(num_heads=0)
