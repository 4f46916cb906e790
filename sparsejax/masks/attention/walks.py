"""Where walks over a grid of blocks go, from given blocks down, right, or down and right.

`NB` is the number of blocks per side; leading axes (layers) are independent. A path within the grid
has at most 2 (NB - 1) moves.
"""

import jax
import jax.numpy as jnp
import numpy as np


def walk_greedily(pooled: jax.Array, *, starts: np.ndarray) -> jax.Array:
    """Return the blocks that walks to the largest neighbour move to.

    Blocks outside the grid count as zero; ties go to below-right, then to right. The next block
    depends only on the present one, so walks that meet stay together, and the set of present blocks
    is enough.

    Args:
      pooled: floating[..., NB, NB], non-negative block values.
      starts: bool[NB, NB], where walks begin; these blocks are visited only if another walk does.

    Returns:
      bool[..., NB, NB], True = visited.
    """
    bordered = _pad_last_two(pooled, (0, 1), (0, 1), 0)
    down, right, diagonal = bordered[..., 1:, :-1], bordered[..., :-1, 1:], bordered[..., 1:, 1:]
    goes_down = (down > right) & (down > diagonal)
    goes_right = ~(down > right) & (right > diagonal)
    goes_diagonal = ~(goes_down | goes_right)

    def move(_, walks):
        present, reached = walks
        present = (
            _move(present & goes_down, 1, 0, False)
            | _move(present & goes_right, 0, 1, False)
            | _move(present & goes_diagonal, 1, 1, False)
        )
        return present, reached | present

    present = jnp.broadcast_to(starts, pooled.shape)
    _, reached = jax.lax.fori_loop(
        0, 2 * (pooled.shape[-1] - 1), move, (present, jnp.zeros(pooled.shape, bool))
    )
    return reached


def find_flood_levels(pooled: jax.Array, *, starts: np.ndarray) -> jax.Array:
    """Return the level of each block: a flood over the blocks above a threshold enters it below.

    level[i, j] = max over paths from a start to (i, j) of the least value on the path

    The start itself does not count, unless (i, j) is one: water rises from every start.

    Args:
      pooled: floating[..., NB, NB], block values.
      starts: bool[NB, NB], where the flood begins.

    Returns:
      floating[..., NB, NB], -inf where no path leads.
    """

    def rise(state):
        levels, _ = state
        source = jnp.where(starts, jnp.inf, levels)
        best = jnp.maximum(_move(source, 1, 0, -jnp.inf), _move(source, 0, 1, -jnp.inf))
        best = jnp.maximum(best, _move(source, 1, 1, -jnp.inf))
        higher = jnp.where(starts, levels, jnp.minimum(best, pooled))
        return higher, (higher > levels).any()

    dry = jnp.where(starts, pooled, -jnp.inf)
    levels, _ = jax.lax.while_loop(lambda state: state[1], rise, (dry, jnp.bool_(True)))
    return levels


def _move(x: jax.Array, rows: int, columns: int, fill: float) -> jax.Array:
    """Return x[..., i - rows, j - columns], `fill` outside the grid."""
    size = x.shape[-1]
    return _pad_last_two(x, (rows, 0), (columns, 0), fill)[..., :size, :size]


def _pad_last_two(
    x: jax.Array, rows: tuple[int, int], columns: tuple[int, int], fill: float
) -> jax.Array:
    pads = [(0, 0)] * (x.ndim - 2) + [rows, columns]
    return jnp.pad(x, pads, constant_values=fill)
