"""Masked decay: nothing on kept weights, rate times the weight on pruned ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks import decay_in_backward, masked_decay


def test_kept_weights_are_left_alone_and_pruned_ones_pulled():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((3, 8, 8)).astype(np.float32)
    mask = rng.random(w.shape) < 0.5
    decay = np.array(masked_decay(jnp.array(w), jnp.array(mask), 0.25))
    np.testing.assert_array_equal(decay[mask], 0)
    np.testing.assert_array_equal(decay[~mask], 0.25 * w[~mask])

    grad = rng.standard_normal(w.shape).astype(np.float32)
    np.testing.assert_array_equal((grad + decay)[mask], grad[mask])


def test_kept_weights_that_are_not_finite_give_no_decay():
    w = jnp.array([jnp.nan, jnp.inf, 2.0])
    mask = jnp.array([True, True, False])
    np.testing.assert_array_equal(masked_decay(w, mask, 0.5), [0, 0, 1])


def test_leaves_without_a_mask_get_zeros():
    w = {"up": {"kernel": jnp.full((2, 2), 4.0), "bias": jnp.full(2, jnp.inf)}, "norm": jnp.ones(3)}
    mask = {"up": {"kernel": jnp.eye(2, dtype=bool), "bias": None}, "norm": None}
    decay = masked_decay(w, mask, 0.5)
    assert jax.tree.structure(decay) == jax.tree.structure(w)
    np.testing.assert_array_equal(decay["up"]["kernel"], [[0, 2], [2, 0]])
    np.testing.assert_array_equal(decay["up"]["bias"], [0, 0])
    np.testing.assert_array_equal(decay["norm"], [0, 0, 0])


def test_a_traced_rate_is_taken_and_types_stay():
    w, mask = jnp.full((4,), -2.0, jnp.bfloat16), jnp.arange(4) < 2
    decays = jax.vmap(lambda rate: masked_decay(w, mask, rate))(jnp.array([0.0, 0.5, 4.0]))
    assert decays.dtype == jnp.bfloat16
    np.testing.assert_array_equal(decays[:, 2:], [[0, 0], [-1, -1], [-8, -8]])
    np.testing.assert_array_equal(decays[:, :2], np.zeros((3, 2)))


def test_a_backward_pass_may_add_it():
    w, mask = jnp.array([2.0, -3.0, jnp.inf]), jnp.array([True, False, True])
    rates = jnp.array([0.0, 0.5])

    def grad(rate):
        value, pull_back = jax.vjp(lambda w: decay_in_backward(w, mask, rate), w)
        return value, pull_back(jnp.array([1.0, 1.0, 7.0]))[0]

    values, grads = jax.vmap(grad)(rates)
    np.testing.assert_array_equal(values, [w, w])
    np.testing.assert_array_equal(grads, [[1, 1, 7], [1, -0.5, 7]])


@pytest.mark.parametrize("mask", [jnp.ones((2, 2)), jnp.ones((2,), bool)])
def test_bad_masks_are_named(mask):
    with pytest.raises(ValueError, match=r"mask must be bool\[2, 2\]"):
        masked_decay(jnp.ones((2, 2)), mask, 0.1)


def test_a_missing_mask_is_an_error():
    with pytest.raises(ValueError, match="head"):
        masked_decay({"up": jnp.ones(2), "head": jnp.ones(2)}, {"up": jnp.ones(2, bool)}, 0.1)
