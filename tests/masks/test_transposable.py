"""The best 2:4 pattern of every tile: against brute force in exact arithmetic, and invariants."""

import hypothesis
import hypothesis.extra.numpy as hypothesis_numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks import retained_l1, transposable_mask
from sparsejax.masks.weights import transposable


def list_legal_patterns():
    """Return all [4, 4] with two ones per row and column, earliest kept entries first."""
    every = (np.arange(2**16)[::-1, None] >> np.arange(16)[::-1]) & 1
    every = every.reshape(-1, 4, 4)
    return every[(every.sum(1) == 2).all(1) & (every.sum(2) == 2).all(1)]


LEGAL = list_legal_patterns()


def to_tiles(w):
    *_, rows, columns = w.shape
    tiles = w.reshape(-1, rows // 4, 4, columns // 4, 4).swapaxes(-3, -2)
    return tiles.reshape(-1, 4, 4)


def to_totals(w):
    """Return the exact sum of magnitudes that each legal pattern keeps of each tile."""
    magnitudes = np.abs(to_tiles(w)).reshape(-1, 16)
    assert magnitudes.dtype == np.int64 and magnitudes.max() < 2**40
    return magnitudes @ LEGAL.reshape(-1, 16).T


def check_best_and_first(w_integer, mask):
    expected = LEGAL[to_totals(w_integer).argmax(1)]
    np.testing.assert_array_equal(to_tiles(np.array(mask)), expected)


def is_legal(mask):
    tiles = to_tiles(np.array(mask))
    return (tiles.sum(1) == 2).all() and (tiles.sum(2) == 2).all()


def make_adversarial(seed=0):
    """Return i64[8, 64, 64]: ties, zeros, single entries, rows and diagonals, wide ranges."""
    rng = np.random.default_rng(seed)
    shape = (64, 64)
    single = np.zeros((16, 4, 16, 4), np.int64)
    index = np.arange(256)
    single[index // 16, index % 4, index % 16, index // 4 % 4] = index
    return np.stack(
        [
            np.zeros(shape, np.int64),
            np.full(shape, -7),
            rng.integers(-1, 2, shape),
            rng.integers(-3, 4, shape),
            rng.integers(-(2**20), 2**20, shape),
            single.reshape(shape),
            np.broadcast_to(rng.integers(0, 5, 64)[:, None], shape),
            # Greedy rows go wrong: the diagonal of a tile is large.
            np.tile(8 * np.eye(4, dtype=np.int64), (16, 16)) + rng.integers(0, 6, shape),
        ]
    )


def test_there_are_ninety_patterns():
    assert len(LEGAL) == 90


def test_the_best_pattern_wins_and_of_equals_the_first():
    w = make_adversarial()
    check_best_and_first(w, transposable_mask(jnp.array(w, jnp.float32)))


def test_ties_of_bf16_are_those_of_exact_arithmetic():
    rng = np.random.default_rng(0)
    mantissa, exponent = rng.integers(128, 256, (64, 64)), rng.integers(0, 13, (64, 64))
    # Few values and every tile twice transposed make ties; a row copied into the next one, too.
    mantissa[::4], exponent[::4] = mantissa[1::4], exponent[1::4]
    w = (mantissa << exponent) * rng.choice([-1, 1], (64, 64))
    tied = (to_totals(w) == to_totals(w).max(1, keepdims=True)).sum(1) > 1
    assert tied.sum() > 50
    check_best_and_first(w, transposable_mask(jnp.array(w, jnp.bfloat16)))


@pytest.mark.ci
def test_gaussian_tiles_keep_what_brute_force_keeps():
    w = np.random.default_rng(0).standard_normal((8, 64, 64)).astype(np.float32)
    exact = np.abs(to_tiles(w.astype(np.float64))).reshape(-1, 16)
    best = (exact @ LEGAL.reshape(-1, 16).T).max(1)
    mask = transposable_mask(jnp.array(w))
    kept = (exact * to_tiles(np.array(mask)).reshape(-1, 16)).sum(1)
    assert (kept >= best * (1 - 4e-7)).all()
    assert is_legal(mask)


@pytest.mark.ci
def test_gaussian_weights_keep_the_known_share():
    w = jax.random.normal(jax.random.key(0), (4, 512, 512))
    # The standard deviation over 2^20 weights is 2.3e-4.
    np.testing.assert_allclose(retained_l1(w, transposable_mask(w)).mean(), 0.7024, atol=1e-3)


def test_nan_infinite_and_huge_weights_stay_legal_and_are_kept():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((8, 64, 64)).astype(np.float32)
    odd = np.stack([rng.permuted(LEGAL[rng.integers(90)]) for _ in range(8 * 256)])
    legal = LEGAL[rng.integers(90, size=8 * 256)]
    values = np.array([np.nan, np.inf, -np.inf, 3e38], np.float32)

    def put(where):
        tiles = to_tiles(w).copy()
        tiles[where == 1] = rng.choice(values, int(where.sum()))
        back = tiles.reshape(8, 16, 16, 4, 4).swapaxes(-3, -2)
        return back.reshape(w.shape)

    mask = transposable_mask(jnp.array(put(legal)))
    np.testing.assert_array_equal(to_tiles(np.array(mask)), legal == 1)

    mask = np.array(transposable_mask(jnp.array(put(odd))))
    assert is_legal(mask)
    most = (odd.reshape(-1, 16) @ LEGAL.reshape(-1, 16).T).max(1)
    np.testing.assert_array_equal((to_tiles(mask) * odd).sum((1, 2)), most)


@pytest.mark.ci
def test_leading_axes_jit_and_vmap_change_nothing():
    w = jnp.array(make_adversarial(1), jnp.float32) + jax.random.normal(
        jax.random.key(1), (8, 64, 64)
    )
    mask = transposable_mask(w)
    assert mask.dtype == jnp.bool_ and mask.shape == w.shape
    for other in (
        transposable_mask(w.reshape(2, 4, 64, 64)).reshape(w.shape),
        jax.vmap(transposable_mask)(w),
        jnp.stack([transposable_mask(layer) for layer in w]),
    ):
        np.testing.assert_array_equal(other, mask)


@pytest.mark.ci
def test_pieces_join_where_they_do_not_divide(monkeypatch):
    w = jax.random.normal(jax.random.key(2), (20, 32))
    whole = transposable_mask(w)
    monkeypatch.setattr(transposable, "_WEIGHTS_AT_A_TIME", 2 * 4 * 32)
    np.testing.assert_array_equal(transposable_mask.__wrapped__(w), whole)


@pytest.mark.ci
def test_memory_does_not_grow_with_the_weights():
    w = jax.ShapeDtypeStruct((64, 512, 512), jnp.float32)
    memory = transposable_mask.lower(w).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8e6 < w.size


@hypothesis.settings(derandomize=True)
@hypothesis.given(
    w=hypothesis_numpy.arrays(np.int64, (8, 8), elements=st.integers(-20, 20)),
    exponent=st.integers(-40, 40),
    signs=hypothesis_numpy.arrays(np.int64, (8, 8), elements=st.sampled_from([-1, 1])),
)
def test_scale_signs_and_transposition(w, exponent, signs):
    mask = transposable_mask(jnp.array(w, jnp.float32))
    check_best_and_first(w, mask)
    scaled = np.ldexp((w * signs).astype(np.float32), exponent)
    np.testing.assert_array_equal(transposable_mask(jnp.array(scaled)), mask)

    turned = np.array(transposable_mask(jnp.array(w.T, jnp.float32))).T
    kept, kept_turned = (np.abs(to_tiles(w)) * to_tiles(m) for m in (np.array(mask), turned))
    np.testing.assert_array_equal(kept.sum((1, 2)), kept_turned.sum((1, 2)))
    totals = to_totals(w)
    unique = (totals == totals.max(1, keepdims=True)).sum(1) == 1
    np.testing.assert_array_equal(to_tiles(np.array(mask))[unique], to_tiles(turned)[unique])


@pytest.mark.parametrize(
    ("w", "message"),
    [
        (jnp.zeros((6, 8)), r"w.shape=\(6, 8\)"),
        (jnp.zeros((2, 8, 10)), r"w.shape=\(2, 8, 10\)"),
        (jnp.zeros(16), r"w.shape=\(16,\)"),
        (jnp.zeros((0, 4, 4)), r"w.shape=\(0, 4, 4\)"),
        (jnp.zeros((4, 4), jnp.int32), "w.dtype=int32"),
    ],
)
def test_bad_weights_are_named(w, message):
    with pytest.raises(ValueError, match=message):
        transposable_mask(w)
