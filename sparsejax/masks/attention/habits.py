"""What a head of attention will need next, by what it needed before.

Legend: B batch, N query heads, I query blocks, J key blocks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# How a score is made of its parts, and the query blocks that what is known of a head counts as;
# chosen on calibration documents of a pretrained model, see `benchmarks/pretrained_attention.py`.
_SEEN, _FAR, _NEAR, _NEAR_SEEN, _KNOWN_ROWS = 0.3, 1.0, 0.5, 0.25, 64


class Habits(NamedTuple):
    """How heads attend, on average over positions.

    Attributes:
      far_N: f32[N], square of the largest share that one far block gets.
      near_N: f32[N], square of the share of the block before.
    """

    far_N: jax.Array
    near_N: jax.Array


def list_far(num_blocks: int, *, num_sinks: int) -> np.ndarray:
    """Return which key blocks are far: two or more before the query block, and no sinks.

    Args:
      num_blocks: int, I = J.
      num_sinks: int, first key blocks, which are kept anyway.

    Returns:
      bool[I, J].
    """
    row, column = np.indices((num_blocks, num_blocks))
    return (row - column >= 2) & (column >= num_sinks)


def predict_scores(
    shares_BNIJ: jax.Array, habits: Habits | None = None, *, num_sinks: int
) -> jax.Array:
    """Predict which key blocks the queries of a block will need, from what the sampled ones saw.

    A sampled query tells of one moment. What its head does at other times tells how often it looks
    far away at all, and how much at the block before. With p the shares and d = i - j the distance,
    and means over the query blocks up to i, and habits as if they were those of 64 more,

      far_i = mean_i' max_(j far) p_(i' j)^2
      near_i = mean_i' p_(i' i'-1)^2

      score_ij = 0.3 p_ij^2 + far_i d^-2 / sum_far d^-2   far blocks
      score_ij = 0.25 p_ij^2 + 0.5 near_i                 the block before

    Squares, since it is the blocks that a query rests on which a loss misses, and not the sum of
    many small shares.

    Args:
      shares_BNIJ: f32[B, N, I, J], of sampled queries; I = J.
      habits: Habits by calibration, or None.
      num_sinks: int, first key blocks, which are kept anyway and not far.

    Returns:
      f32[B, N, I, J], causal: row i depends on rows up to i.
    """
    num_blocks = shares_BNIJ.shape[-1]
    row, column = np.indices((1, 1, num_blocks, num_blocks))[2:]
    distance, far_IJ = row - column, list_far(num_blocks, num_sinks=num_sinks)[None, None]
    near_IJ = distance == 1
    known = 0 if habits is None else _KNOWN_ROWS
    counted_I = (known + np.arange(1, num_blocks + 1)).astype(np.float32)[None, None]

    def average(values_BNI, before_N):
        sums_BNI = jnp.cumsum(values_BNI, axis=-1)
        if before_N is not None:
            sums_BNI = sums_BNI + known * before_N[None, :, None]
        return (sums_BNI / counted_I)[..., None]

    far_N, near_N = (None, None) if habits is None else habits
    squares = shares_BNIJ**2
    far_BNI1 = average(jnp.where(far_IJ, squares, 0).max(-1), far_N)
    near_BNI1 = average(jnp.where(near_IJ, squares, 0).sum(-1), near_N)
    weight_IJ = np.where(far_IJ, 1.0 / np.maximum(distance, 1) ** 2, 0.0)
    weight_IJ /= np.maximum(weight_IJ.sum(-1, keepdims=True), 1e-9)
    far = _SEEN * squares + _FAR * far_BNI1 * weight_IJ.astype(np.float32)
    return jnp.where(near_IJ, _NEAR_SEEN * squares + _NEAR * near_BNI1, far)
