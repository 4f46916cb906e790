"""Every one of the 90 patterns tried: the oracle.

Letters: K N as in `transposable_mask`; T tiles of 4 x 4, P patterns, R the 6 ways to keep two of
four.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.transposable_mask.call import TILE, TransposableArrays, TransposableFacts
from pallas_kernels.transposable_mask.magnitudes import cap_magnitudes

_ROWS_R4 = np.array([row for row in itertools.product((True, False), repeat=TILE) if sum(row) == 2])
# For each pattern and each of its rows an index into _ROWS_R4, the first in row order first.
_PATTERNS_P4 = np.array(
    [
        rows
        for rows in itertools.product(range(len(_ROWS_R4)), repeat=TILE)
        if (_ROWS_R4[list(rows)].sum(axis=0) == 2).all()
    ]
)


def run(arrays: TransposableArrays, facts: TransposableFacts) -> jax.Array:
    """Take the pattern with the largest sum, of equal ones the first.

    Returns:
      bool[K, N].

    Numerics:
      Sums of two entries of each row are added pair by pair, in f32 or f64. Their order is not that
      of "xla", so the choice may be another where sums differ by less than 4e-7 of the largest.
    """
    del facts
    w_KN = arrays.w
    columns = w_KN.shape[1] // TILE
    tiles_T44 = cap_magnitudes(w_KN).reshape(-1, TILE, columns, TILE).swapaxes(1, 2)
    tiles_T44 = tiles_T44.reshape(-1, TILE, TILE)
    kept = np.nonzero(_ROWS_R4)[1].reshape(-1, 2)
    sums_T4R = tiles_T44[..., kept[:, 0]] + tiles_T44[..., kept[:, 1]]
    a, b, c, d = _PATTERNS_P4.T
    upper_TP = sums_T4R[:, 0, a] + sums_T4R[:, 1, b]
    lower_TP = sums_T4R[:, 2, c] + sums_T4R[:, 3, d]
    best_T = (upper_TP + lower_TP).argmax(axis=1)
    mask_T44 = jnp.asarray(_ROWS_R4[_PATTERNS_P4])[best_T]
    return mask_T44.reshape(-1, columns, TILE, TILE).swapaxes(1, 2).reshape(w_KN.shape)
