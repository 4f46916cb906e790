"""The search on any device, without trying the 90 patterns one by one.

With rows a, b, c, d of a tile, the patterns are made of three kinds of choices between two of its
columns p and q:

  top(p, q)    = max(a_p + b_q, a_q + b_p)        one column in row a, the other in row b
  bottom(p, q) = max(c_p + d_q, c_q + d_p)        one column in row c, the other in row d
  half(p, q)   = max(ab_p + cd_q, ab_q + cd_p)    one column in both upper rows, the other in both
                                                  lower ones; ab = a + b, cd = c + d

  rows a and b     patterns   largest sum
  are equal               6   half(p, q) + half(r, s)
  share no column        36   (top(p, q) + top(r, s)) + (bottom(t, u) + bottom(v, w))
  share one column       48   (top(p, q) + bottom(p, q)) + half(r, s)

In the last line pq are all six pairs and rs the two other columns; elsewhere pq|rs and tu|vw are
01|23 or 02|13, whichever is larger.

Rounding is monotone: the largest of rounded sums is the rounded sum of the largest. Of equal
choices the one with the smaller column above comes first in row order, whatever the others are; of
equal sums of different kinds the pattern with the larger number is taken, its entries being bits in
row order, the first one highest.

Letters: K N as in `transposable_mask`; S strips, rows of tiles; C tiles side by side; T tiles.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import targets_gpu
from pallas_kernels.meshes import vary_like
from pallas_kernels.transposable_mask.call import TILE, TransposableArrays, TransposableFacts
from pallas_kernels.transposable_mask.magnitudes import cap_magnitudes

# Weights handled at a time, 5 bytes each: they stay in a CPU's cache, and a GPU starts few kernels.
_WEIGHTS_AT_A_TIME = 2**19
_GPU_WEIGHTS_AT_A_TIME = 2**23

# Two of the columns; the two that are left stand at the mirrored place.
_PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


def run(arrays: TransposableArrays, facts: TransposableFacts) -> jax.Array:
    """Search some rows of tiles at a time.

    Returns:
      bool[K, N].

    Numerics:
      See `transposable_mask`.
    """
    most = _GPU_WEIGHTS_AT_A_TIME if targets_gpu() else _WEIGHTS_AT_A_TIME
    at_a_time = max(1, most // (TILE * facts.columns))
    strips_S4N = arrays.w.reshape(-1, TILE, facts.columns)
    mask_S4N = _search_in_pieces(strips_S4N, min(at_a_time, len(strips_S4N)))
    return mask_S4N.reshape(arrays.w.shape)


@functools.partial(jax.jit, static_argnames="at_a_time")
def _search_in_pieces(strips_S4N, at_a_time):
    strips = len(strips_S4N)

    def search(index, mask_S4N):
        # The last piece begins earlier where pieces do not divide the whole.
        start = jnp.minimum(index * at_a_time, strips - at_a_time)
        piece = jax.lax.dynamic_slice_in_dim(strips_S4N, start, at_a_time)
        return jax.lax.dynamic_update_slice_in_dim(mask_S4N, _search(piece), start, axis=0)

    mask_S4N = vary_like(jnp.zeros(strips_S4N.shape, bool), strips_S4N)
    return jax.lax.fori_loop(0, -(-strips // at_a_time), search, mask_S4N)


def _search(w_S4N):
    """Return the mask of some rows of tiles."""
    strips = len(w_S4N)
    tiles_SiCj = cap_magnitudes(w_S4N).reshape(strips, TILE, -1, TILE)
    # Without the barriers XLA computes everything in one loop on a CPU, and 20 times as slowly.
    rows_ijT = jax.lax.optimization_barrier(
        tiles_SiCj.transpose(1, 3, 0, 2).reshape(TILE, TILE, -1)
    )
    bits_T = jax.lax.optimization_barrier(_find_best(*map(list, rows_ijT)))
    position_1414 = jnp.arange(TILE**2)[::-1].reshape(1, TILE, 1, TILE)
    mask_SiCj = (bits_T.reshape(strips, 1, -1, 1) >> position_1414) & 1
    return mask_SiCj.astype(bool).reshape(w_S4N.shape)


def _find_best(a, b, c, d):
    """Return the bits of the best pattern.

    Args:
      a, b, c, d: rows of the tiles, f32[T] for each column.
    """
    tops = _choose(a, b, 0x8000, 0x0800)
    bottoms = _choose(c, d, 0x0080, 0x0008)
    ab, cd = ([x + y for x, y in zip(*rows, strict=True)] for rows in ((a, b), (c, d)))
    halves = _choose(ab, cd, 0x8800, 0x0088)
    kinds = [
        _split(halves),
        _join(_split(tops), _split(bottoms)),
        *map(_join, map(_join, tops, bottoms), reversed(halves)),
    ]
    _, bits_T = functools.reduce(_take_larger, kinds)
    return bits_T


def _choose(upper, lower, upper_bit, lower_bit):
    """Choose for every pair of columns which is kept above and which below.

    Args:
      upper_bit: column 0 in the upper rows; column p stands p places lower.
      lower_bit: column 0 in the lower rows.

    Returns:
      list of sum and bits, in the order of `_PAIRS`.
    """
    choices = []
    for p, q in _PAIRS:
        straight, crossed = upper[p] + lower[q], upper[q] + lower[p]
        bits = (upper_bit >> p) | (lower_bit >> q), (upper_bit >> q) | (lower_bit >> p)
        is_straight = straight >= crossed
        choices.append((jnp.where(is_straight, straight, crossed), jnp.where(is_straight, *bits)))
    return choices


def _split(choices):
    """Take the better split of the columns, 01|23 or 02|13."""
    return _take_larger(_join(choices[0], choices[5]), _join(choices[1], choices[4]))


def _join(one, other):
    return one[0] + other[0], one[1] | other[1]


def _take_larger(one, other):
    """Take the larger sum, of equal ones that whose pattern comes first in row order."""
    (sum_1, bits_1), (sum_2, bits_2) = one, other
    is_other = (sum_2 > sum_1) | ((sum_2 == sum_1) & (bits_2 > bits_1))
    return jnp.where(is_other, sum_2, sum_1), jnp.where(is_other, bits_2, bits_1)
