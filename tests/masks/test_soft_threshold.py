"""S-STE: shrinking two of four continuously, the frozen scale, the straight-through gradient."""

import hypothesis
import hypothesis.extra.numpy as hypothesis_numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks import (
    magnitude_nm_mask,
    soft_threshold,
    soft_threshold_mask,
    soft_threshold_scale,
    soft_threshold_ste,
)


def shrink_oracle(w, axis):
    groups = np.moveaxis(w, axis, -1)
    shape = groups.shape
    groups = groups.reshape(-1, 4)
    threshold = np.sort(np.abs(groups), axis=1)[:, 1:2]
    shrunk = np.sign(groups) * np.maximum(np.abs(groups) - threshold, 0)
    return np.moveaxis(shrunk.reshape(shape), -1, axis)


@pytest.mark.parametrize("axis", [-2, *(pytest.param(a, marks=pytest.mark.ci) for a in (0, 1, -1))])
def test_soft_threshold_equals_its_equation(axis):
    rng = np.random.default_rng(0)
    for w in (rng.standard_normal((8, 16, 12)), rng.integers(-2, 3, (8, 16, 12))):
        w = w.astype(np.float32)
        shrunk = np.array(soft_threshold(jnp.array(w), axis=axis))
        np.testing.assert_array_equal(shrunk, shrink_oracle(w, axis))
        mask = np.array(soft_threshold_mask(jnp.array(w), axis=axis))
        np.testing.assert_array_equal(mask, shrunk != 0)
        assert not np.signbit(shrunk[~mask]).any()


@pytest.mark.ci
@hypothesis.settings(derandomize=True)
@hypothesis.given(
    w=hypothesis_numpy.arrays(np.int64, (4, 16), elements=st.integers(-6, 6)),
    change=hypothesis_numpy.arrays(np.int64, (4, 16), elements=st.integers(-1, 1)),
)
def test_small_changes_stay_small_across_ties(w, change):
    w = jnp.array(w, jnp.float32)
    moved = w + jnp.array(change) / 64
    difference = soft_threshold(moved, axis=1) - soft_threshold(w, axis=1)
    assert jnp.abs(difference).max() <= 2 / 64
    for x in (w, moved):
        mask = soft_threshold_mask(x, axis=1)
        assert mask.reshape(4, 4, 4).sum(-1).max() <= 2
        assert not (mask & ~magnitude_nm_mask(x, axis=1)).any()
        np.testing.assert_array_equal(soft_threshold(x, axis=1) != 0, mask)


@pytest.mark.ci
def test_a_swap_at_a_tie_jumps_under_a_mask_only():
    before, after = jnp.array([5.0, 3, 2.99, 1]), jnp.array([5.0, 2.99, 3, 1])
    hard = [jnp.where(magnitude_nm_mask(w, axis=0), w, 0) for w in (before, after)]
    assert jnp.abs(hard[1] - hard[0]).max() > 2.9
    soft = [soft_threshold(w, axis=0) for w in (before, after)]
    assert jnp.abs(soft[1] - soft[0]).max() < 0.02


def test_ties_keep_at_most_two():
    w = jnp.array([[1.0, 1, 1, 1], [2, 1, 1, 1], [2, -2, 1, 1], [2, 2, 2, 1], [0, 0, 0, 3]])
    expected = [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(soft_threshold_mask(w, axis=1).astype(int), expected)


@pytest.mark.ci
def test_a_nan_spoils_its_group_alone():
    w = jnp.array([[1.0, jnp.nan, 2, 3], [1, 2, 3, 4]])
    np.testing.assert_array_equal(soft_threshold(w, axis=1), [[np.nan] * 4, [0, 0, 1, 2]])
    np.testing.assert_array_equal(
        soft_threshold_mask(w, axis=1), [[False] * 4, [False, False, True, True]]
    )


@pytest.mark.ci
def test_the_scale_of_a_gaussian_does_not_depend_on_its_size():
    size = jnp.array([1e-2, 1, 30])[:, None, None]
    w = size * jax.random.normal(jax.random.key(0), (3, 512, 1024))
    for axis in (-2, -1):
        beta = soft_threshold_scale(w, axis=axis)
        assert beta.shape == (3,) and beta.dtype == jnp.float32
        # The standard deviation over 2^19 weights is 1.3e-3.
        np.testing.assert_allclose(beta, 1.4837, atol=5e-3)


@pytest.mark.ci
def test_the_scale_is_least_squares_per_layer():
    w = jax.random.normal(jax.random.key(0), (2, 8, 16)) + jnp.arange(2)[:, None, None]
    beta, shrunk = soft_threshold_scale(w, axis=-2), soft_threshold(w, axis=-2)
    for layer in range(2):
        x = np.array(shrunk[layer]).reshape(-1, 1)
        expected = np.linalg.lstsq(x, np.array(w[layer]).ravel())[0]
        np.testing.assert_allclose(beta[layer], expected[0], rtol=1e-5)
    assert abs(beta[0] - beta[1]) > 0.1
    np.testing.assert_array_equal(soft_threshold_scale(jnp.ones((2, 4, 4)), axis=-1), [1, 1])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.ci)])
def test_the_gradient_passes_straight_through(dtype):
    keys = jax.random.split(jax.random.key(0), 2)
    w, dy = (jax.random.normal(key, (2, 8, 6), dtype) for key in keys)
    beta = jnp.array([1.5, 3.0])
    y, pull = jax.vjp(lambda w, beta: soft_threshold_ste(w, beta, axis=-2), w, beta)
    expected = beta[:, None, None] * soft_threshold(w, axis=-2)
    np.testing.assert_array_equal(y, expected.astype(dtype))
    assert y.dtype == dtype
    dw, dbeta = pull(dy)
    np.testing.assert_array_equal(dw, dy)
    np.testing.assert_array_equal(dbeta, 0)


@pytest.mark.ci
def test_layers_may_be_scanned():
    w = jax.random.normal(jax.random.key(0), (3, 8, 4))
    beta = soft_threshold_scale(w, axis=-2)

    def loss(w):
        def layer(total, w_and_beta):
            y = soft_threshold_ste(*w_and_beta, axis=0)
            return total + (y**2).sum(), None

        return jax.lax.scan(layer, 0.0, (w, beta))[0]

    y = soft_threshold_ste(w, beta, axis=-2)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(w), 2 * y, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: soft_threshold(jnp.zeros((6, 4)), axis=0), r"w.shape=\(6, 4\)"),
        (lambda: soft_threshold(jnp.zeros((4, 4), jnp.int32), axis=0), "w.dtype=int32"),
        (lambda: soft_threshold_mask(jnp.zeros((4, 4)), axis=2), "axis=2"),
        (lambda: soft_threshold_scale(jnp.zeros(4), axis=0), r"w.shape=\(4,\)"),
        (
            lambda: soft_threshold_ste(jnp.zeros((3, 4, 4)), jnp.ones(2), axis=1),
            r"beta.shape=\(2,\)",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
