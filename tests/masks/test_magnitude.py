"""N:M masks by magnitude: against sorting, and their known share of a Gaussian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks import magnitude_nm_mask, retained_l1


def sort_oracle(w, n, m, axis):
    groups = np.moveaxis(np.abs(w), axis, -1)
    shape = groups.shape
    groups = groups.reshape(-1, m)
    order = np.argsort(-groups, axis=1, kind="stable")
    mask = np.zeros(groups.shape, bool)
    np.put_along_axis(mask, order[:, :n], True, 1)
    return np.moveaxis(mask.reshape(shape), -1, axis)


@pytest.mark.parametrize(
    ("n", "m"),
    [(2, 4), *(pytest.param(*p, marks=pytest.mark.ci) for p in ((1, 4), (4, 4), (1, 2), (2, 8)))],
)
@pytest.mark.parametrize("axis", [0, 1, -2, -1])
def test_the_largest_of_each_group_are_kept_and_of_equals_the_first(n, m, axis):
    rng = np.random.default_rng(0)
    w = rng.integers(-3, 4, (8, 16, 24)).astype(np.float32)
    mask = np.array(magnitude_nm_mask(jnp.array(w), n=n, m=m, axis=axis))
    assert mask.dtype == np.bool_
    np.testing.assert_array_equal(mask, sort_oracle(w, n, m, axis))


@pytest.mark.ci
def test_gaussian_weights_keep_the_known_share():
    w = jax.random.normal(jax.random.key(0), (4, 512, 512))
    for axis in (-1, -2):
        share = retained_l1(w, magnitude_nm_mask(w, axis=axis)).mean()
        np.testing.assert_allclose(share, 0.7445, atol=1e-3)


def test_nan_counts_as_infinite():
    nan, inf = np.nan, np.inf
    w = jnp.array([[9.0, 1, nan, 2], [nan, nan, -inf, 0], [0, 1, 2, nan], [-inf, 5, nan, 1]])
    expected = [[1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0]]
    np.testing.assert_array_equal(magnitude_nm_mask(w, axis=1).astype(int), expected)


@pytest.mark.ci
def test_jit_and_vmap_change_nothing():
    w = jax.random.normal(jax.random.key(0), (3, 8, 12), jnp.bfloat16)
    mask = magnitude_nm_mask(w, axis=-2)
    over_layers = jax.vmap(lambda w: magnitude_nm_mask(w, axis=0))
    np.testing.assert_array_equal(over_layers(w), mask)
    np.testing.assert_array_equal(jax.jit(over_layers)(w), mask)


@pytest.mark.parametrize(
    ("w", "options", "message"),
    [
        (jnp.zeros((6, 8)), {"axis": 0}, r"m=4, axis=0 for w.shape=\(6, 8\)"),
        (jnp.zeros((8, 8)), {"axis": 2}, r"axis=2 for w.shape=\(8, 8\)"),
        (jnp.zeros((8, 8)), {"axis": -3}, r"axis=-3 for w.shape=\(8, 8\)"),
        (jnp.zeros((8, 8)), {"axis": 0, "n": 5}, "n=5, m=4"),
        (jnp.zeros((8, 8)), {"axis": 0, "n": 0}, "n=0, m=4"),
        (jnp.zeros((8, 8), jnp.int8), {"axis": 0}, "w.dtype=int8"),
    ],
)
def test_bad_input_is_named(w, options, message):
    with pytest.raises(ValueError, match=message):
        magnitude_nm_mask(w, **options)
