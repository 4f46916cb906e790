"""Density of block masks, per leading index and over the visible blocks."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks import block_density


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
