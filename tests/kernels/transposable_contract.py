"""What every backend of `transposable_mask` returns: against brute force in exact arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import transposable_mask


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


def make_tied_in_bf16():
    """Return i64[64, 64] of eight bits times a power of two; many tiles have several best."""
    rng = np.random.default_rng(0)
    mantissa, exponent = rng.integers(128, 256, (64, 64)), rng.integers(0, 13, (64, 64))
    # Few values and every tile twice transposed make ties; a row copied into the next one, too.
    mantissa[::4], exponent[::4] = mantissa[1::4], exponent[1::4]
    return (mantissa << exponent) * rng.choice([-1, 1], (64, 64))


def check_exact(search):
    """Check values whose sums are exact in f32."""
    w = make_adversarial()
    check_best_and_first(w, search(jnp.array(w, jnp.float32)))


def check_not_finite(search):
    """Check that infinities, NaN and huge values are kept where they can be."""
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

    mask = search(jnp.array(put(legal)))
    np.testing.assert_array_equal(to_tiles(np.array(mask)), legal == 1)

    mask = np.array(search(jnp.array(put(odd))))
    assert is_legal(mask)
    most = (odd.reshape(-1, 16) @ LEGAL.reshape(-1, 16).T).max(1)
    np.testing.assert_array_equal((to_tiles(mask) * odd).sum((1, 2)), most)


def check_equals_xla(search, shape, dtype):
    """Check that Gaussian weights, whose sums are rounded, give the bits of "xla"."""
    w = jax.random.normal(jax.random.key(sum(shape)), shape, dtype)
    mask = search(w)
    assert mask.dtype == jnp.bool_ and mask.shape == shape
    np.testing.assert_array_equal(mask, transposable_mask(w, implementation="xla"))
