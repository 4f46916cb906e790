"""Dynamic sparse training: exact counts, what drops and grows, moments."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax.masks import count_kept, layer_densities
from sparsejax.patterns import Unstructured
from sparsejax.recipes import (
    MagnitudeConfig,
    MSTConfig,
    RigLConfig,
    SETConfig,
    StaticWeightsConfig,
    get_weight_masks,
    make_magnitude,
    make_mst,
    make_rigl,
    make_set,
    make_static_weights,
)

L, K, N = 2, 8, 12
NUM_STEPS, INTERVAL = 40, 3
SHAPES = {"mlp/up": (L, K, N), "mlp/down": (L, 2 * N, K)}
KNOWN = {"num_steps": NUM_STEPS, "patterns": dict.fromkeys(SHAPES, Unstructured())}
ATTENTION = {"block_size": 16, "length": 80, "causal": True}
OFTEN = {"update_interval": INTERVAL}


@functools.cache
def mst(**changes):
    options = OFTEN | {"sparsity": 0.6, "warmup": 0.3, "restoration": 0.3, "stairs": 3}
    return make_mst(MSTConfig(**KNOWN | ATTENTION | options | changes))


@functools.cache
def rigl(**changes):
    return make_rigl(RigLConfig(**KNOWN | OFTEN | changes))


@functools.cache
def magnitude(**changes):
    return make_magnitude(MagnitudeConfig(**KNOWN | OFTEN | changes))


@functools.cache
def gradual_set(**changes):
    return make_set(SETConfig(**KNOWN | OFTEN | changes))


@functools.cache
def static_weights(**changes):
    return make_static_weights(StaticWeightsConfig(**KNOWN | changes))


def draw(seed):
    """Parameters, or gradients of them."""
    rng = np.random.default_rng(seed)

    def normal(shape):
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    mlp = {name.removeprefix("mlp/"): {"kernel": normal(shape)} for name, shape in SHAPES.items()}
    mlp["up"]["bias"] = normal((L, N))
    return {"embedding": {"embedding": normal((5, K))}, "blocks": {"mlp": mlp}}


def full_masks():
    mlp = {
        name.removeprefix("mlp/"): {"kernel_mask": jnp.ones(shape, bool)}
        for name, shape in SHAPES.items()
    }
    attention = {"block_mask": jnp.ones((L, 1, 1, 5, 5), bool)}
    return {"blocks": {"attention": attention, "mlp": mlp}}


def begin(recipe, seed=0):
    params = draw(seed)
    return recipe.init(full_masks(), params, jax.random.key(seed)), params


def masks_of(sparsity):
    return jax.tree.map(np.asarray, get_weight_masks(sparsity.masks))


def kernels_of(params):
    mlp = params["blocks"]["mlp"]
    return {name: np.asarray(mlp[name.removeprefix("mlp/")]["kernel"]) for name in SHAPES}


def make_update(recipe):
    """Return the jitted end of a step."""
    return jit_update(recipe.update, recipe.phases[0])


@functools.cache
def jit_update(update, phase):
    @jax.jit
    def jitted(sparsity, params, moments, grads, step):
        return update(
            sparsity,
            params,
            moments,
            {"model": grads, "recipe": {}},
            step=step,
            key=jax.random.fold_in(jax.random.key(7), step),
            phase=phase,
            learning_rate=0.1,
        )

    return jitted


def make_counts(sparsity, method="erdos_renyi"):
    """Return how many weights of each layer a sparsity leaves, as a method shares them out."""
    densities = layer_densities(SHAPES, density=1 - sparsity, method=method)
    return {name: int(count_kept(np.prod(SHAPES[name][1:]), densities[name])) for name in SHAPES}


def ramp(sparsities, start, end):
    return np.interp(np.arange(NUM_STEPS), (start, end), sparsities)


# Sparsity by step, written down anew. Updates are at multiples of 3.
_STAIRS = 0.6 * np.minimum(np.arange(NUM_STEPS) // 4, 3) / 3
_PRUNED = 0.8 * (1 - (1 - ramp((0, 1), 4, 27)) ** 3)
EXPECTED = {
    "mst": (mst, np.where(np.arange(NUM_STEPS) < 28, _STAIRS, ramp((0.6, 0), 28, 39)), 40),
    "rigl": (rigl, np.full(NUM_STEPS, 0.8), 30),
    "set": (gradual_set, np.full(NUM_STEPS, 0.8), 40),
    "magnitude": (magnitude, _PRUNED, 30),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_counts_are_exact_after_every_update_and_pruned_weights_zero(name):
    make, sparsities, end_step = EXPECTED[name]
    method = "uniform" if name == "magnitude" else "erdos_renyi"
    recipe = make()
    assert recipe.name == name
    sparsity, params = begin(recipe)
    update = make_update(recipe)
    changes = 0
    for step in range(NUM_STEPS):
        before = masks_of(sparsity)
        trained = jax.tree.map(lambda w, g: w + 0.3 * g, params, draw(100 + step))
        sparsity, params, _ = update(sparsity, trained, (), draw(200 + step), jnp.int32(step))
        after = masks_of(sparsity)
        due = step and step % INTERVAL == 0 and step < end_step
        if name == "magnitude":
            due = due and step >= 4
        for layer, mask in after.items():
            if due:
                expected = make_counts(sparsities[step], method)[layer]
                assert mask.sum((1, 2)).tolist() == [expected] * L, (step, layer)
            else:
                np.testing.assert_array_equal(mask, before[layer])
            assert not kernels_of(params)[layer][~mask].any()
            changes += int((mask != before[layer]).any())
        metrics = recipe.metrics(sparsity, step=jnp.int32(step), phase=recipe.phases[0])
        if not due:
            assert all(np.isnan(value).all() for value in metrics.values())
            continue
        np.testing.assert_allclose(metrics["target_density"], 1 - sparsities[step], atol=1e-6)
        kept = sum(mask.sum() for mask in after.values())
        np.testing.assert_allclose(
            metrics["mask_density"], kept / sum(m.size for m in after.values()), rtol=1e-6
        )
        np.testing.assert_allclose(
            metrics["mask_density/mlp/up"], after["mlp/up"].mean((1, 2)), rtol=1e-6
        )
        assert metrics["dense_gradient"] == (name in ("mst", "rigl"))
    assert changes > 10
    assert update._cache_size() == 1, "schedules are traced"


def test_static_masks_stay_and_are_of_the_density():
    recipe = static_weights()
    sparsity, _ = begin(recipe)
    update = make_update(recipe)
    before = masks_of(sparsity)
    assert {n: m.sum((1, 2)).tolist() for n, m in before.items()} == {
        name: [count] * L for name, count in make_counts(0.8).items()
    }
    assert (before["mlp/up"][0] != before["mlp/up"][1]).any(), "layers draw for themselves"
    for step in range(5):
        sparsity, trained, _ = update(sparsity, draw(step), (), draw(9), jnp.int32(step))
        jax.tree.map(np.testing.assert_array_equal, masks_of(sparsity), before)
        assert not any(kernels_of(trained)[name][~mask].any() for name, mask in before.items())
        assert kernels_of(trained)["mlp/up"][before["mlp/up"]].all()
    assert recipe.metrics(sparsity, step=0, phase=recipe.phases[0]) == {}


def test_a_mask_may_begin_with_the_largest_weights():
    recipe = static_weights(initial_mask="magnitude", layer_density="uniform")
    sparsity, params = begin(recipe)
    mask, w = masks_of(sparsity)["mlp/up"], np.abs(kernels_of(params)["mlp/up"])
    for layer in range(L):
        assert w[layer][mask[layer]].min() > w[layer][~mask[layer]].max()
    other = recipe.init(full_masks(), params, jax.random.key(5))
    np.testing.assert_array_equal(masks_of(other)["mlp/up"], mask)


def update_once(recipe, *, step=INTERVAL, moments=(), seed=0):
    sparsity, params = begin(recipe, seed)
    update = make_update(recipe)
    # The first step masks the weights, a later one changes the topology.
    sparsity, params, _ = update(sparsity, params, moments, draw(1), jnp.int32(0))
    grads = draw(2)
    after, new_params, moments = update(sparsity, params, moments, grads, jnp.int32(step))
    return masks_of(sparsity), masks_of(after), params, new_params, grads, moments


def test_rigl_drops_the_smallest_weights_and_grows_the_largest_gradients():
    old, new, params, new_params, grads, _ = update_once(rigl())
    fraction = 0.15 * (1 + np.cos(np.pi * INTERVAL / 30))
    for name in SHAPES:
        w, g = kernels_of(params)[name], kernels_of(grads)[name]
        for layer in range(L):
            mask = old[name][layer].ravel()
            replaced = int(fraction * mask.sum())
            assert replaced > 0
            order = np.argsort(np.where(mask, np.abs(w[layer].ravel()), np.inf))
            expected = mask.copy()
            expected[order[:replaced]] = False
            size = np.where(expected, -1, np.abs(g[layer].ravel()))
            expected[np.argsort(size)[::-1][:replaced]] = True
            np.testing.assert_array_equal(new[name][layer].ravel(), expected)
        stayed, grown = old[name] & new[name], new[name] & ~old[name]
        after = kernels_of(new_params)[name]
        assert grown.any() and not after[grown].any(), "new weights start at 0"
        np.testing.assert_array_equal(after[stayed], w[stayed])
    embedding = new_params["embedding"]["embedding"]
    np.testing.assert_array_equal(embedding, params["embedding"]["embedding"])


def test_mst_grows_three_by_gradient_for_one_at_random():
    recipe = mst()
    sparsity, params = begin(recipe)
    update = make_update(recipe)
    for step in range(13):
        sparsity, params, _ = update(sparsity, params, (), draw(step), jnp.int32(step))
    # At step 15 the sparsity rests. Gradients that are largest in one row.
    before, grads = masks_of(sparsity), draw(0)
    free = jnp.asarray(~before["mlp/down"])
    grads["blocks"]["mlp"]["down"]["kernel"] = jnp.where(free, 1.0, 0.0).at[:, 10:].multiply(0.5)
    after, _, _ = update(sparsity, params, (), grads, jnp.int32(15))
    grown = masks_of(after)["mlp/down"] & ~before["mlp/down"]
    lower = grown[:, 10:].sum((1, 2))
    total = int(before["mlp/down"][0].sum() * 0.15 * (1 + np.cos(np.pi * 3 / 16)))
    assert total >= 4
    # Some dropped ones may return at random; those by gradient never are dropped ones here.
    by_gradient = grown[:, :10].sum((1, 2))
    assert (by_gradient >= total * 3 // 4).all() and (lower <= total - total * 3 // 4).all()


def test_set_grows_at_random_and_without_gradients():
    recipe = gradual_set()
    sparsity, params = begin(recipe)
    update = make_update(recipe)
    sparsity, params, _ = update(sparsity, params, (), draw(1), jnp.int32(0))
    one, other = (
        masks_of(update(sparsity, params, (), draw(seed), jnp.int32(INTERVAL))[0])
        for seed in (2, 3)
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)
    later = masks_of(update(sparsity, params, (), draw(2), jnp.int32(2 * INTERVAL))[0])
    kept = [m["mlp/down"] & ~masks_of(sparsity)["mlp/down"] for m in (one, later)]
    assert (kept[0] != kept[1]).any(), "every step draws anew"


def test_magnitude_pruning_only_loses_the_smallest():
    old, new, params, new_params, _, _ = update_once(magnitude(), step=12)
    for name in SHAPES:
        w = np.abs(kernels_of(params)[name])
        lost = old[name] & ~new[name]
        assert lost.any() and not (new[name] & ~old[name]).any()
        for layer in range(L):
            assert w[layer][lost[layer]].max() < w[layer][new[name][layer]].min()
        after = kernels_of(new_params)[name]
        np.testing.assert_array_equal(after[new[name]], kernels_of(params)[name][new[name]])


@pytest.mark.parametrize("rule", ["stale", "zero", "mean"])
def test_moments_of_grown_weights(rule):
    moment = {"model": draw(30), "recipe": {"x": jnp.float32(3)}}
    adam = optax.ScaleByAdamState(count=jnp.int32(4), mu=moment, nu=moment)
    old, new, _, _, _, after = update_once(rigl(moments=rule), moments=(adam,))
    assert after[0].count == 4 and after[0].mu["recipe"]["x"] == 3
    for name in SHAPES:
        grown = new[name] & ~old[name]
        before = kernels_of(moment["model"])[name]
        mean = before.mean((1, 2), where=old[name], keepdims=True)
        first = {"stale": (before, before), "zero": (0, 0), "mean": (0, mean)}[rule]
        for got, value in zip((after[0].mu, after[0].nu), first, strict=True):
            expected = np.where(grown, value, before)
            np.testing.assert_allclose(kernels_of(got["model"])[name], expected, rtol=1e-5)
    bias = after[0].nu["model"]["blocks"]["mlp"]["up"]["bias"]
    np.testing.assert_array_equal(bias, moment["model"]["blocks"]["mlp"]["up"]["bias"])


@pytest.mark.parametrize("make", [mst, rigl, gradual_set, magnitude, static_weights])
def test_the_learning_rate_of_sparse_weights_may_grow_as_their_density_falls(make):
    updates = {"model": draw(3), "recipe": {}}
    sparsity, _ = begin(make())
    assert make().transform_updates(updates, sparsity, make().phases[0]) is updates
    recipe = make(rate_exponent=0.5)
    masks = jax.tree.map(lambda m: m.at[0, :, 0].set(False), full_masks())
    sparsity = dataclasses.replace(sparsity, masks=masks)
    scaled = recipe.transform_updates(updates, sparsity, recipe.phases[0])
    for name, (_, _, n) in SHAPES.items():
        before, after = (kernels_of(x["model"])[name] for x in (updates, scaled))
        # Layer 0 lost one of its columns.
        np.testing.assert_allclose(after[0], before[0] / np.sqrt(1 - 1 / n), rtol=1e-6)
        np.testing.assert_array_equal(after[1], before[1])
    mlps = (x["model"]["blocks"]["mlp"] for x in (updates, scaled))
    np.testing.assert_array_equal(*(mlp["up"]["bias"] for mlp in mlps))


@pytest.mark.parametrize(
    ("make", "skips"),
    [
        (mst, True),
        (rigl, True),
        (functools.partial(rigl, keep_optimizer_step=True), False),
        (functools.partial(mst, keep_optimizer_step=True), False),
        (gradual_set, False),
        (magnitude, False),
        (static_weights, False),
    ],
)
def test_an_update_takes_the_place_of_the_optimizer_where_it_is_published_so(make, skips):
    recipe = make()
    skipped = [
        step for step in range(9) if recipe.skip_optimizer(jnp.int32(step), recipe.phases[0])
    ]
    assert skipped == ([3, 6] if skips else [])


def test_gradients_of_pruned_weights_are_masked():
    recipe = rigl()
    sparsity, _ = begin(recipe)
    grads = {"model": draw(4), "recipe": {"own": jnp.ones(2)}}
    masked = recipe.mask_gradients(grads, sparsity, recipe.phases[0])
    assert masked["recipe"] is grads["recipe"]
    for name, mask in masks_of(sparsity).items():
        expected = np.where(mask, kernels_of(grads["model"])[name], 0)
        np.testing.assert_array_equal(kernels_of(masked["model"])[name], expected)
    bias = masked["model"]["blocks"]["mlp"]["up"]["bias"]
    np.testing.assert_array_equal(bias, grads["model"]["blocks"]["mlp"]["up"]["bias"])
    assert all(phase.masked_gradients and phase.sparse_weights for phase in recipe.phases)
