"""What a head of attention will need next, by how heads attend and by what it looked at before.

Legend: B batch, N query heads, I query blocks, J key blocks, C classes of distance.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# The first distances of the classes, in blocks. One class more is that of the first block behind
# the sinks, which heads look at from everywhere.
_DISTANCES = (1, 2, 3, 4, 6, 10, 18, 34)
NUM_CLASSES = len(_DISTANCES) + 1
# How much of what a query block needed the next one still needs.
_MEMORY = 0.7
# Below every cost that matters.
_NOTHING = 1e-12


class Habits(NamedTuple):
    """What a dropped block costs each head, in parts that add up.

    Attributes:
      distance_NC: f32[N, C], for each class of distance; the last class adds to that of a block's
        distance.
      seen_N: f32[N], times the square of the share that the sampled query gives to the block.
      before_N: f32[N], times the decaying mean of these squares over the query blocks before.
    """

    distance_NC: Any
    seen_N: Any
    before_N: Any


def make_even_habits(num_heads: int) -> Habits:
    """Return what is assumed of heads that nothing is known of.

    What is seen counts most; a block at distance d counts as a share of 0.3 / d.
    """
    distances = np.array([0.1 / first**2 for first in _DISTANCES] + [0.0], np.float32)
    return Habits(
        np.tile(distances, (num_heads, 1)),
        np.ones(num_heads, np.float32),
        np.full(num_heads, 0.5, np.float32),
    )


def classify_distances(num_blocks: int, *, num_sinks: int) -> np.ndarray:
    """Say which classes of distance each block belongs to.

    Args:
      num_blocks: int, I = J.
      num_sinks: int, first key blocks, which are kept anyway.

    Returns:
      f32[C, I, J] of 0 and 1; none for sinks, the diagonal and what is behind it.
    """
    row, column = np.indices((num_blocks, num_blocks))
    distance = np.where(column >= num_sinks, row - column, 0)
    ends = (*_DISTANCES[1:], num_blocks + 1)
    classes = [(distance >= a) & (distance < b) for a, b in zip(_DISTANCES, ends, strict=True)]
    return np.stack([*classes, (distance >= 1) & (column == num_sinks)]).astype(np.float32)


def remember(squares_BNIJ: jax.Array) -> jax.Array:
    """Average over the query blocks before each one, the last of them most.

    before_i = 0.3 sum_(k >= 1) 0.7^(k - 1) square_(i - k)

    What is not finite counts as 0, since rows where no token is yet may hold anything.

    Args:
      squares_BNIJ: f32[B, N, I, J], I = J.

    Returns:
      f32[B, N, I, J]; the first query block has zeros.
    """
    num_blocks = squares_BNIJ.shape[-1]
    row, other = np.indices((num_blocks, num_blocks))
    past = row - other
    weight_II = np.where(past >= 1, (1 - _MEMORY) * _MEMORY ** np.maximum(past - 1, 0), 0)
    squares_BNIJ = jnp.where(jnp.isfinite(squares_BNIJ), squares_BNIJ, 0)
    weight_II = jnp.asarray(weight_II, jnp.float32)
    return jnp.einsum("ik,bnkj->bnij", weight_II, squares_BNIJ, precision="highest")


def predict_scores(
    shares_BNIJ: jax.Array, habits: Habits | None = None, *, num_sinks: int
) -> jax.Array:
    """Predict what dropping a block would cost, from what sampled queries saw and from habits.

    With p the shares, c the class of the block's distance,

      score_ij = distance_c + seen p_ij^2 + before 0.3 sum_(k >= 1) 0.7^(k - 1) p_(i - k, j)^2

    Squares, since the change of the output grows with the share, and a loss with its square.

    Args:
      shares_BNIJ: f32[B, N, I, J], of sampled queries; I = J.
      habits: Habits by calibration; None assumes the same of all heads.
      num_sinks: int, first key blocks, which are kept anyway.

    Returns:
      f32[B, N, I, J], causal: row i depends on rows up to i.
    """
    N, _, num_blocks = shares_BNIJ.shape[1:]
    distance_NC, seen_N, before_N = make_even_habits(N) if habits is None else habits
    classes_CIJ = classify_distances(num_blocks, num_sinks=num_sinks)
    row, column = np.indices((num_blocks, num_blocks))
    # Of blocks of one class the nearest come first, and of heads that know nothing.
    nearness_IJ = (1e-3 / np.maximum(row - column, 1)).astype(np.float32)
    base_NIJ = jnp.einsum("nc,cij->nij", jnp.asarray(distance_NC), classes_CIJ, precision="highest")
    base_NIJ = base_NIJ * (1 + nearness_IJ)[None] + (_NOTHING * nearness_IJ)[None]
    squares = shares_BNIJ**2
    scores = jnp.asarray(seen_N)[None, :, None, None] * squares
    scores += jnp.asarray(before_N)[None, :, None, None] * remember(squares)
    return scores + base_NIJ[None]
