"""Masks that are 2:4 along rows and along columns: the weight and its transpose are both sparse.

Legend: K rows and N columns of a weight, cut into tiles of 4 x 4; C = N / 4 tiles side by side;
P the 90 patterns of a tile; R the 6 ways to keep two of four.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

# Weights handled at a time: the sums of their rows, 6 bytes a weight, stay in a CPU's cache, and
# a GPU still has 32,768 tiles to work on.
_WEIGHTS_AT_A_TIME = 2**19

_PAIRS = tuple(itertools.combinations(range(4), 2))
# For each pattern and each of its rows the pair that is kept, as an index into _PAIRS.
_PATTERNS_P4 = np.array(
    [
        rows
        for rows in itertools.product(range(6), repeat=4)
        if all(sum(column in _PAIRS[row] for row in rows) == 2 for column in range(4))
    ]
)
# For each pattern its 16 entries in row order, the first in the lowest bit.
_BITS_P = np.array(
    [
        sum(1 << (4 * i + j) for i, row in enumerate(rows) for j in _PAIRS[row])
        for rows in _PATTERNS_P4
    ]
)


@jax.jit
def transposable_mask(w: jax.Array) -> jax.Array:
    """Keep two of four along both axes, with the largest sum of magnitudes.

    mask of a tile = argmax over P of sum_ij P_ij |w_ij|,  P in {0, 1}^(4 x 4) with two ones in
    every row and in every column

    Each tile of 4 x 4 weights tries all 90 such P. Ties go to the P whose kept entries come first
    in row order; this order is ours. Gaussian weights keep 0.7024 of their L1 mass, against 0.7445
    if only rows are constrained.

    Magnitudes above a sixteenth of the largest finite number, infinities and NaN count as that
    sixteenth: a tile keeps as many NaNs as a legal pattern can, so that they show in the product
    instead of being masked away.

    Args:
      w: floating[..., K, N], K and N multiples of 4; leading axes are layers.

    Returns:
      bool[..., K, N], True = kept.

    Raises:
      ValueError: if w is not floating, has fewer than two axes, is empty, or K or N is not a
        multiple of 4.

    Numerics:
      The eight magnitudes are added pair by pair in f32 at least (f64 for f64), always in the same
      order: the choice is the same on every device, jitted or mapped. The kept sum is within 4e-7
      of the largest. Sums of bf16 are exact, with the ties of exact arithmetic, unless magnitudes
      in one tile differ by more than 2^13.

    References:
      Hu et al., FST, arXiv:2404.01847: the search as a convolution with 90 filters.

    Example:
      Rows alone would keep the first two columns throughout.
      >>> w = jnp.array([[9.0, 8, 0, 1], [8, 9, 1, 0], [7, 6, 5, 4], [6, 7, 4, 5]])
      >>> transposable_mask(w).astype(int)
      Array([[1, 1, 0, 0],
             [1, 1, 0, 0],
             [0, 0, 1, 1],
             [0, 0, 1, 1]], dtype=int32)
    """
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"w must be floating, got w.dtype={w.dtype}")
    if w.ndim < 2 or 0 in w.shape or w.shape[-2] % 4 or w.shape[-1] % 4:
        raise ValueError(
            f"w must be [..., K, N] with K and N positive multiples of 4, got w.shape={w.shape}"
        )
    strips = w.reshape(-1, 4, w.shape[-1])
    at_a_time = max(1, _WEIGHTS_AT_A_TIME // strips[0].size)
    mask = jax.lax.map(_choose, strips, batch_size=min(at_a_time, len(strips)))
    return mask.reshape(w.shape)


def _choose(w_4N: jax.Array) -> jax.Array:
    """Return the mask of one row of tiles."""
    rows_P4, bits_P = jnp.asarray(_PATTERNS_P4), jnp.asarray(_BITS_P, jnp.int32)
    dtype = jnp.promote_types(w_4N.dtype, jnp.float32)
    magnitude_4N = jnp.abs(w_4N.astype(dtype))
    # A comparison with NaN is false. The sum of eight stays finite.
    most = jnp.finfo(dtype).max / 16
    magnitude_4N = jnp.where(magnitude_4N < most, magnitude_4N, most)
    first, second = np.array(_PAIRS).T
    tiles_4C4 = magnitude_4N.reshape(4, -1, 4)
    sums_4RC = jnp.moveaxis(tiles_4C4[..., first] + tiles_4C4[..., second], -1, 1)

    def try_pattern(index, best):
        best_C, best_bits_C = best
        a, b, c, d = rows_P4[index]
        total_C = (sums_4RC[0, a] + sums_4RC[1, b]) + (sums_4RC[2, c] + sums_4RC[3, d])
        better_C = total_C > best_C
        return (
            jnp.where(better_C, total_C, best_C),
            jnp.where(better_C, bits_P[index], best_bits_C),
        )

    shape = sums_4RC.shape[2:]
    start = jnp.full(shape, -1, dtype), jnp.zeros(shape, jnp.int32)
    # All at once XLA compiles for minutes on a CPU; one by one the loop is twice as slow.
    _, bits_C = jax.lax.fori_loop(0, len(bits_P), try_pattern, start, unroll=6)
    position_4_4 = jnp.arange(16).reshape(4, 1, 4)
    return ((bits_C[:, None] >> position_4_4) & 1).astype(bool).reshape(w_4N.shape)
