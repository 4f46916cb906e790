"""Static masks and magnitude pruning: what is kept, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.patterns import NMPattern, Unstructured
from tests.recipes.two_weights import (
    SHAPES,
    L,
    begin,
    draw,
    full_masks,
    kernels_of,
    magnitude,
    make_counts,
    make_update,
    masks_of,
    static_weights,
    update_once,
)


def test_static_masks_stay_and_are_of_the_density():
    recipe = static_weights()
    sparsity, params = begin(recipe)
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
    del params


def test_a_mask_may_begin_with_the_largest_weights():
    recipe = static_weights(initial_mask="magnitude", layer_density="uniform")
    sparsity, params = begin(recipe)
    mask, w = masks_of(sparsity)["mlp/up"], np.abs(kernels_of(params)["mlp/up"])
    for layer in range(L):
        assert w[layer][mask[layer]].min() > w[layer][~mask[layer]].max()
    other = recipe.init(full_masks(), params, jax.random.key(5))
    np.testing.assert_array_equal(masks_of(other)["mlp/up"], mask)


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


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (magnitude, {"start_fraction": 0.8}, "start_fraction must be .* below end_fraction, got"),
        (
            static_weights,
            {"sparsity": -0.1},
            "recipe.static_weights: initial_sparsity must be in .* got initial_s",
        ),
        (
            static_weights,
            {"layer_density": "er"},
            "recipe.static_weights: method must be .* got method='er'",
        ),
        (
            static_weights.__wrapped__,
            {"sparsity": 0.5, "patterns": {"a": NMPattern(), "b": Unstructured()}},
            "sparse_weights must be one n:m pattern, not transposable, or none of n:m, got",
        ),
    ],
)
def test_settings_out_of_range_are_refused(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)
