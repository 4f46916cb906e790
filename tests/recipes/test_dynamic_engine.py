"""What all recipes of dynamic sparse training share: exact counts, moments, rates, gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax.recipes import apply_weight_masks
from sparsejax.report.metrics import fetch_metrics
from tests.recipes.two_weights import (
    INTERVAL,
    NUM_STEPS,
    SHAPES,
    L,
    begin,
    draw,
    full_masks,
    gradual_set,
    kernels_of,
    magnitude,
    make_counts,
    make_update,
    masks_of,
    mst,
    rigl,
    static_weights,
    update_once,
)


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


@pytest.mark.parametrize(
    "name",
    ["rigl", *(pytest.param(n, marks=pytest.mark.ci) for n in ("mst", "set", "magnitude"))],
)
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
        found = recipe.metrics(sparsity, step=jnp.int32(step), phase=recipe.phases[0])
        metrics = fetch_metrics(found)
        if not due:
            assert found and not metrics
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


@pytest.mark.parametrize(
    "rule", ["mean", *(pytest.param(r, marks=pytest.mark.ci) for r in ("stale", "zero"))]
)
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
    grads = draw(4)
    masked = apply_weight_masks(sparsity.masks, grads)
    for name, mask in masks_of(sparsity).items():
        expected = np.where(mask, kernels_of(grads)[name], 0)
        np.testing.assert_array_equal(kernels_of(masked)[name], expected)
    bias = masked["blocks"]["mlp"]["up"]["bias"]
    np.testing.assert_array_equal(bias, grads["blocks"]["mlp"]["up"]["bias"])
    assert all(phase.masked_gradients and phase.sparse_weights for phase in recipe.phases)
