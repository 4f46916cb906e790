"""Density of block masks, flip rates and retained magnitude, per leading index and in total."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks import block_density, flip_rate, retained_l1, total_flip_rate


def test_density_per_layer():
    masks = np.zeros((2, 3, 4, 8), bool)
    masks[1, 2, :, :3] = True
    expected = np.zeros((2, 3), np.float32)
    expected[1, 2] = 3 / 8
    density = block_density(jnp.array(masks))
    assert density.dtype == jnp.float32
    np.testing.assert_array_equal(density, expected)


def test_causal_density_counts_visible_blocks_only():
    everything = jnp.ones((5, 5), bool)
    assert block_density(everything, causal=True) == 1
    np.testing.assert_allclose(block_density(jnp.eye(5, dtype=bool), causal=True), 5 / 15)
    assert block_density(~jnp.tril(everything), causal=True) == 0


@pytest.mark.parametrize(
    ("mask", "causal", "message"),
    [
        (jnp.ones((2, 2)), False, "mask.dtype=float32"),
        (jnp.ones(2, bool), False, r"mask.shape=\(2,\)"),
        (jnp.ones((2, 0), bool), False, r"mask.shape=\(2, 0\)"),
        (jnp.ones((2, 4), bool), True, r"mask.shape=\(2, 4\)"),
    ],
)
def test_bad_masks_are_named(mask, causal, message):
    with pytest.raises(ValueError, match=message):
        block_density(mask, causal=causal)


def test_flip_rate_counts_changed_entries_per_layer():
    old = np.tile([True, True, False, False], (3, 8, 2))
    new = old.copy()
    new[1] = ~new[1]
    new[2, 0, :4] = [False, True, True, False]
    rate = flip_rate(jnp.array(old), jnp.array(new))
    assert rate.dtype == jnp.float32
    np.testing.assert_array_equal(rate, np.array([0, 1, 2 / 64], np.float32))
    np.testing.assert_array_equal(rate, flip_rate(jnp.array(new), jnp.array(old)))


def test_total_flip_rate_weighs_leaves_by_their_size():
    old = {"up": jnp.zeros((2, 4, 12), bool), "down": jnp.zeros((4, 8), bool), "head": None}
    new = old | {"down": jnp.ones((4, 8), bool)}
    assert total_flip_rate(old, old) == 0
    np.testing.assert_allclose(jax.jit(total_flip_rate)(old, new), 32 / 128, rtol=1e-7)
    assert total_flip_rate(old, jax.tree.map(jnp.logical_not, old)) == 1


def test_retained_l1_per_layer():
    w = jnp.array([[[1.0, -3], [4, 0]], [[0, 0], [0, 0]], [[1, 1], [1, -1]]])
    mask = jnp.array([[[True, False], [True, True]], [[True] * 2] * 2, [[False] * 2] * 2])
    np.testing.assert_array_equal(retained_l1(w, mask), np.array([5 / 8, 1, 0], np.float32))
    assert jnp.isnan(retained_l1(jnp.full((2, 2), jnp.nan), mask[0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: flip_rate(m, m.astype(int)), "new must be bool"),
        (lambda m: flip_rate(m, m[:, :1]), r"new must be .* shape \(2, 4\)"),
        (lambda m: flip_rate(m[0], m[0]), r"old must be bool\[..., K, N\]"),
        (lambda m: total_flip_rate({"head": None}, {"head": None}), "at least one mask"),
        (lambda m: total_flip_rate({"up": m}, {"down": m}), "down"),
        (lambda m: retained_l1(jnp.ones((4, 4)), m), r"mask must be .* shape \(4, 4\)"),
    ],
)
def test_bad_pairs_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((2, 4), bool))
