"""Masks of exact counts: against a stable sort, whatever the ties, and fair draws."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks import magnitude_mask, random_mask

SHAPE = (6, 11)
SIZE = 66


def sort_oracle(w, num_kept, among=None):
    """Keep the first entries of a stable sort by falling magnitude, NaN before all."""
    w = np.asarray(w, np.float64)
    magnitude = np.where(np.isnan(w), np.inf, np.abs(w)).ravel()
    candidates = np.arange(w.size) if among is None else np.flatnonzero(among)
    order = candidates[np.argsort(-magnitude[candidates], kind="stable")]
    mask = np.zeros(w.size, bool)
    mask[order[: max(num_kept, 0)]] = True
    return mask.reshape(w.shape)


# Ties everywhere, both zeros, both ends of the range, subnormal numbers.
VALUES = [0.0, -0.0, 1.0, -1.0, 1 + 2**-7, 3e38, np.inf, -np.inf, np.nan, -np.nan, 1e-40, 2e-40]


@hypothesis.given(data=st.data(), num_kept=st.integers(-3, SIZE + 3), use_among=st.booleans())
@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.ci)])
def test_the_largest_are_kept_and_of_equals_the_first(dtype, data, num_kept, use_among):
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    pool = data.draw(st.sampled_from([VALUES, VALUES[:2], VALUES[2:5], None]))
    w = rng.standard_normal(SHAPE) if pool is None else rng.choice(pool, SHAPE)
    w = jnp.array(w.astype(np.float32)).astype(dtype)
    among = rng.random(SHAPE) < rng.random() if use_among else None
    mask = magnitude_mask(w, num_kept, among=None if among is None else jnp.array(among))
    expected = sort_oracle(np.asarray(w, np.float32), num_kept, among)
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(
    "size", [5, *(pytest.param(n, marks=pytest.mark.ci) for n in (1, 2, 3, 4, 15, 16, 17))]
)
def test_ties_are_cut_at_every_place(size):
    counts = jnp.arange(size + 1)
    masks = jax.vmap(magnitude_mask, (None, 0))(jnp.full(size, 2.0), counts)
    np.testing.assert_array_equal(masks, np.arange(size) < np.arange(size + 1)[:, None])


@pytest.mark.ci
def test_half_precision_and_more_axes():
    rng = np.random.default_rng(0)
    w = rng.integers(-4, 5, (3, 4, 5)).astype(np.float16)
    np.testing.assert_array_equal(magnitude_mask(jnp.array(w), 17), sort_oracle(w, 17))


@pytest.mark.ci
def test_layers_are_mapped_with_their_own_counts():
    rng = np.random.default_rng(0)
    w = rng.integers(-9, 10, (4, *SHAPE)).astype(np.float32)
    counts = np.array([0, 5, 40, SIZE])
    masks = jax.jit(jax.vmap(magnitude_mask))(jnp.array(w), jnp.array(counts))
    expected = [sort_oracle(*layer) for layer in zip(w, counts, strict=True)]
    np.testing.assert_array_equal(masks, expected)


@pytest.mark.ci
def test_counts_do_not_recompile():
    traces = []

    @jax.jit
    def select(w, key, num_kept):
        traces.append(num_kept)
        return magnitude_mask(w, num_kept), random_mask(key, w.shape, num_kept)

    w = jax.random.normal(jax.random.key(0), SHAPE)
    for num_kept in (0, 1, 30, SIZE):
        for mask in select(w, jax.random.key(1), jnp.int32(num_kept)):
            assert mask.sum() == num_kept
    assert len(traces) == 1


@pytest.mark.ci
def test_random_masks_are_exact_and_repeat_with_their_key():
    key = jax.random.key(3)
    masks = [np.array(random_mask(key, SHAPE, count)) for count in range(0, SIZE + 1, 6)]
    for count, mask in zip(range(0, SIZE + 1, 6), masks, strict=True):
        assert mask.dtype == np.bool_ and mask.sum() == count
    for smaller, larger in zip(masks, masks[1:], strict=False):
        assert (larger | ~smaller).all()
    np.testing.assert_array_equal(masks[3], random_mask(key, SHAPE, 18))
    assert (masks[3] != np.array(random_mask(jax.random.key(4), SHAPE, 18))).any()


@pytest.mark.ci
def test_random_masks_are_fair_among_their_candidates():
    among = np.arange(SIZE).reshape(SHAPE) % 3 > 0
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = jax.jit(jax.vmap(lambda key: random_mask(key, SHAPE, 11, among=jnp.array(among))))
    masks = np.array(draw(keys))
    np.testing.assert_array_equal(masks.sum((1, 2)), 11)
    assert not masks[:, ~among].any()
    # 11 of 44, five standard deviations.
    frequency = masks.mean(0)[among]
    assert np.abs(frequency - 0.25).max() < 5 * (0.25 * 0.75 / 4000) ** 0.5
    # Ties would favour the first: their half has 5.5 +- 1.45 of the 11.
    first_half = masks[:, among][:, :22].sum(1).mean()
    assert abs(first_half - 5.5) < 5 * 1.45 / 4000**0.5
    # Pairs are drawn without repetition: 11 of 44, then 10 of 43.
    pairs = (masks[:, among][:, :-1] & masks[:, among][:, 1:]).mean()
    np.testing.assert_allclose(pairs, 11 / 44 * 10 / 43, rtol=0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: magnitude_mask(w.astype(int), 3), "w.dtype=int32"),
        (lambda w: magnitude_mask(w, 3.0), r"num_kept must be an integer scalar .* float32\[\]"),
        (lambda w: magnitude_mask(w, jnp.array([3])), r"jax.vmap\), got int32\[1\]"),
        (lambda w: magnitude_mask(w, 3, among=w), r"among must be bool\[2, 4\], got float32"),
        (lambda w: magnitude_mask(w, 3, among=w[0] > 0), r"got bool\[4\]"),
        (lambda w: random_mask(jax.random.key(0), (2, 4), 1.5), "num_kept must be an integer"),
        (lambda w: random_mask(jax.random.key(0), (2, 3), 1, among=w > 0), r"bool\[2, 3\]"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((2, 4)))


def test_layers_too_large_to_count_are_refused():
    w = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
    with pytest.raises(ValueError, match="at most 2147483647 entries, got 2147483648"):
        jax.eval_shape(magnitude_mask, w, 3)
