"""RigL and SET: what drops, what grows, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.patterns import NMPattern
from tests.recipes.two_weights import (
    INTERVAL,
    SHAPES,
    L,
    begin,
    draw,
    gradual_set,
    kernels_of,
    make_update,
    masks_of,
    rigl,
    update_once,
)


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


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (
            rigl,
            {"end_fraction": 1.5},
            r"recipe.rigl: end_fraction must be in \(0, 1\] .* got .*1.5",
        ),
        (rigl, {"update_fraction": 2.0}, r"fraction must be in \[0, 1\], got fraction=2.0"),
        (
            gradual_set,
            {"update_interval_fraction": 0.0},
            r"recipe.set: update_interval_fraction must be in \(0, 1\), got 0.0",
        ),
        (
            rigl.__wrapped__,
            {"patterns": {}},
            "sparse_weights must name at least one",
        ),
        (
            rigl.__wrapped__,
            {"patterns": {"mlp/up": NMPattern()}},
            "sparsity must be 0.5, that of the pattern '2:4', got sparsity=0.8",
        ),
    ],
)
def test_settings_out_of_range_are_refused(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)
