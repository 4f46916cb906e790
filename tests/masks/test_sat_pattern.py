"""SAT's patterns and statistics, against SciPy and hand counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from sparsejax.masks import (
    count_kept_blocks,
    map_distance,
    map_skewness,
    model_pooled_map,
    sat_pattern,
)


def _draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(size=shape), jnp.float32)


@pytest.mark.parametrize(
    ("length", "block_size", "density", "kept"),
    [
        # image, nature, AG News, Yelp, ListOps at its own block size, retrieval
        (1024, 32, 0.05, 51),
        (1024, 32, 0.04, 40),
        (1024, 32, 0.08, 81),
        (2048, 64, 0.04, 40),
        (4096, 64, 0.021, 86),
    ],
)
def test_published_settings_keep_the_published_number_of_blocks(length, block_size, density, kept):
    num_blocks = length // block_size
    assert count_kept_blocks(num_blocks, density=density) == kept
    pattern = sat_pattern(_draw(2, num_blocks, 32), density=density)
    np.testing.assert_array_equal(pattern.sum((1, 2)), kept)


def test_the_model_is_symmetric_and_positive_semidefinite():
    model = np.asarray(model_pooled_map(_draw(16, 4)), np.float64)
    np.testing.assert_array_equal(model, model.T)
    assert np.linalg.eigvalsh(model).min() > -1e-5
    np.testing.assert_allclose(model, np.asarray(_draw(16, 4)) @ np.asarray(_draw(16, 4)).T, 1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_the_largest_entries_are_kept(causal):
    w = _draw(3, 12, 5) - 0.3
    pattern = np.asarray(sat_pattern(w, density=0.25, causal=causal))
    scores = np.asarray(model_pooled_map(w))
    visible = np.tril(np.ones((12, 12), bool)) if causal else np.ones((12, 12), bool)
    for kept, values in zip(pattern, scores, strict=True):
        assert kept.sum() == int(visible.sum() * 0.25) and not kept[~visible].any()
        assert values[kept].min() >= values[visible & ~kept].max()
        if not causal:
            assert (kept != kept.T).sum() <= 2, "symmetric but for a pair at the cut"
    assert not pattern.any(-1).all(), "a row may stay empty: no diagonal is forced"


@pytest.mark.ci
def test_each_head_of_a_layer_keeps_its_own_blocks_and_as_many():
    w = _draw(2, 3, 8, 5)
    kept = sat_pattern(w, density=0.5, causal=True)
    np.testing.assert_array_equal(kept.sum((2, 3)), 18)
    by_head = [sat_pattern(w[:, head], density=0.5, causal=True) for head in range(3)]
    np.testing.assert_array_equal(kept, jnp.stack(by_head, axis=1))


def test_skewness_is_that_of_scipy():
    maps = _draw(3, 40, 40) ** jnp.array([1.0, 3.0, 9.0])[:, None, None]
    expected = [scipy.stats.skew(np.asarray(m, np.float64).ravel()) for m in maps]
    np.testing.assert_allclose(jax.jit(map_skewness)(maps), expected, atol=1e-5)
    # Maps of long sequences: entries are tiny, and sums of their powers would cancel.
    small = 1e-4 + 1e-7 * maps
    expected = [scipy.stats.skew(np.asarray(m, np.float64).ravel()) for m in small]
    np.testing.assert_allclose(map_skewness(small), expected, rtol=1e-2)


def test_distance_is_the_frobenius_norm():
    a, b = _draw(2, 9, 9), _draw(2, 9, 9, seed=1)
    expected = [np.linalg.norm(x) for x in np.asarray(b - a, np.float64)]
    np.testing.assert_allclose(map_distance(a, b), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "at least 0.003906, one of 256 visible blocks, got density=0.0"),
        ({"density": 0.003}, "got density=0.003"),
        ({"density": 1.5}, "density must be at most 1"),
        ({"density": 0.007, "causal": True}, "at least 0.007353, one of 136"),
    ],
)
def test_a_density_that_keeps_no_block_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sat_pattern(jnp.ones((16, 4)), **options)


def test_a_pattern_of_integers_is_refused():
    with pytest.raises(ValueError, match=r"floating\[..., NB, D\], got int32 of shape \(4, 4\)"):
        sat_pattern(jnp.ones((4, 4), jnp.int32), density=0.5)
