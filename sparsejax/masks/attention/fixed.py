"""Static block patterns of sparse attention: windows, sinks, Longformer, BigBird, hybrid.

Block (i, j) holds the queries of block i and the keys of block j. A causal pattern is the
pattern itself without the blocks above the diagonal.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.masks.attention.block_grids import count_at_density, visible_blocks


class Grid(NamedTuple):
    """What a family of patterns may look at.

    Attributes:
      num_blocks: NB, blocks per side.
      visible: bool[NB, NB], True where a block may be kept.
      num_sinks: leading columns that are sinks.
      key: PRNG key of random blocks, if there is one.
    """

    num_blocks: int
    visible: np.ndarray
    num_sinks: int
    key: jax.Array | None


type Family = Callable[[jax.Array, int, Grid], tuple[jax.Array, int]]
"""(kept bool[NB, NB], blocks to add, grid) -> (kept, rest).

It adds the parts of a family beside its window, and returns the blocks that are left for that."""


def sliding_window(num_blocks: int, *, width: int, causal: bool = False) -> jax.Array:
    """Keep the blocks within a window around the diagonal.

    kept[i, j] = |i - j| < width

    Args:
      num_blocks: NB, blocks per side.
      width: blocks from the diagonal to the edge of the window, the diagonal included: a
        query block sees `width` blocks if causal, `2 width - 1` otherwise.
      causal: whether blocks above the diagonal are dropped.

    Returns:
      bool[NB, NB], True = kept.

    Raises:
      ValueError: if `num_blocks` or `width` is not positive.

    Example:
      >>> sliding_window(3, width=2, causal=True).astype(int)
      Array([[1, 0, 0],
             [1, 1, 0],
             [0, 1, 1]], dtype=int32)
    """
    _check_at_least(1, num_blocks=num_blocks, width=width)
    return jnp.asarray((_distance(num_blocks) < width) & visible_blocks(num_blocks, causal=causal))


def sink_window(
    num_blocks: int, *, width: int, num_sinks: int = 1, causal: bool = False
) -> jax.Array:
    """Keep a sliding window, and the first columns: the attention sinks.

    kept[i, j] = |i - j| < width or j < num_sinks

    Args:
      num_blocks: NB, blocks per side.
      width: blocks from the diagonal to the edge of the window, the diagonal included.
      num_sinks: leading blocks that are seen by every block.
      causal: whether blocks above the diagonal are dropped.

    Returns:
      bool[NB, NB], True = kept.

    Raises:
      ValueError: if `num_blocks` or `width` is not positive or `num_sinks` is negative.

    References:
      Xiao et al.: Efficient Streaming Language Models with Attention Sinks, arXiv:2309.17453,
      which has it for inference, with single positions as sinks.

    Example:
      >>> sink_window(4, width=2, causal=True).astype(int)
      Array([[1, 0, 0, 0],
             [1, 1, 0, 0],
             [1, 1, 1, 0],
             [1, 0, 1, 1]], dtype=int32)
    """
    _check_at_least(0, num_sinks=num_sinks)
    window = sliding_window(num_blocks, width=width, causal=causal)
    sinks = np.arange(num_blocks) < num_sinks
    return window | (sinks & visible_blocks(num_blocks, causal=causal))


def longformer(num_blocks: int, *, width: int, num_global: int, causal: bool = False) -> jax.Array:
    """Keep a sliding window, and the first blocks as global rows and columns.

    kept[i, j] = |i - j| < width or min(i, j) < num_global

    Args:
      num_blocks: NB, blocks per side.
      width: blocks from the diagonal to the edge of the window, the diagonal included.
      num_global: leading blocks that see every block and are seen by every block.
      causal: whether blocks above the diagonal are dropped.

    Returns:
      bool[NB, NB], True = kept.

    Raises:
      ValueError: if `num_blocks` or `width` is not positive or `num_global` is negative.

    References:
      Beltagy, Peters, Cohan: Longformer, arXiv:2004.05150, section 3.1, without dilation.

    Example:
      >>> longformer(4, width=1, num_global=1).astype(int)
      Array([[1, 1, 1, 1],
             [1, 1, 0, 0],
             [1, 0, 1, 0],
             [1, 0, 0, 1]], dtype=int32)
    """
    _check_at_least(0, num_global=num_global)
    window = sliding_window(num_blocks, width=width, causal=causal)
    return window | (
        (_nearest_border(num_blocks) < num_global) & visible_blocks(num_blocks, causal=causal)
    )


def bigbird(
    num_blocks: int,
    *,
    width: int,
    num_global: int,
    num_random: int,
    key: jax.Array,
    causal: bool = False,
) -> jax.Array:
    """Keep a sliding window, global rows and columns, and random blocks in each row.

    The random blocks of a row are drawn uniformly, without repetition, from its visible blocks
    outside the window and the globals; a row that has too few keeps all of them.

    Args:
      num_blocks: NB, blocks per side.
      width: blocks from the diagonal to the edge of the window, the diagonal included.
      num_global: leading blocks that see every block and are seen by every block.
      num_random: random blocks per row of blocks.
      key: PRNG key of the draw.
      causal: whether blocks above the diagonal are dropped.

    Returns:
      bool[NB, NB], True = kept.

    Raises:
      ValueError: if `num_blocks` or `width` is not positive, or another count is negative.

    References:
      Zaheer et al.: Big Bird, arXiv:2007.14062, section 2; the globals are those of its
      internal construction, ITC.

    Example:
      >>> bigbird(8, width=1, num_global=0, num_random=2, key=jax.random.key(0)).sum(axis=1)
      Array([3, 3, 3, 3, 3, 3, 3, 3], dtype=int32)
    """
    _check_at_least(0, num_random=num_random)
    fixed = longformer(num_blocks, width=width, num_global=num_global, causal=causal)
    candidates = visible_blocks(num_blocks, causal=causal) & ~fixed
    draws = jnp.where(candidates, jax.random.uniform(key, fixed.shape, jnp.float32), jnp.inf)
    rank_in_row = draws.argsort(axis=1).argsort(axis=1)
    return fixed | (candidates & (rank_in_row < num_random))


def hybrid_mask(length: int, *, stride: int, causal: bool = True) -> jax.Array:
    """Keep a window and every stride-th position before it: MST's hybrid sparse attention.

    kept[i, j] = |i - j| < stride or (i - j) mod stride = 0

    This is the strided pattern of sparse transformers with both parts in every head.

    Args:
      length: T, positions.
      stride: l, positions from a query to the edge of its window, itself included.
      causal: whether positions after the query are dropped.

    Returns:
      bool[T, T], True = kept.

    Raises:
      ValueError: if `length` or `stride` is not positive.

    References:
      Child et al.: Sparse Transformers, arXiv:1904.10509; Hu, Li, Huang, MST, arXiv:2408.11746,
      whose script has l = 128.

    Example:
      >>> hybrid_mask(5, stride=2).astype(int)
      Array([[1, 0, 0, 0, 0],
             [1, 1, 0, 0, 0],
             [1, 1, 1, 0, 0],
             [0, 1, 1, 1, 0],
             [1, 0, 1, 1, 1]], dtype=int32)
    """
    _check_at_least(1, length=length, stride=stride)
    position = jnp.arange(length)
    ahead = position[:, None] - position[None]
    kept = (jnp.abs(ahead) < stride) | (ahead % stride == 0)
    return kept & (ahead >= 0) if causal else kept


def hybrid_blocks(num_blocks: int, *, block: int, stride: int, causal: bool = True) -> jax.Array:
    """Keep the blocks that hold anything `hybrid_mask` keeps.

    If the stride is a multiple of the block, one in stride / block diagonals of blocks is kept;
    otherwise each diagonal of positions touches two diagonals of blocks.

    Args:
      num_blocks: NB, blocks per side.
      block: positions per block.
      stride: as `hybrid_mask`, in positions.
      causal: as `hybrid_mask`.

    Returns:
      bool[NB, NB], True = kept.

    Raises:
      ValueError: if `num_blocks`, `block` or `stride` is not positive.

    References:
      As `hybrid_mask`. The cover by blocks is ours and attends to more than MST does.

    Example:
      >>> hybrid_blocks(5, block=64, stride=128).astype(int)
      Array([[1, 0, 0, 0, 0],
             [1, 1, 0, 0, 0],
             [1, 1, 1, 0, 0],
             [0, 1, 1, 1, 0],
             [1, 0, 1, 1, 1]], dtype=int32)
    """
    _check_at_least(1, num_blocks=num_blocks, block=block, stride=stride)
    index = np.arange(num_blocks)
    # The range of i - j in a block.
    middle = (index[:, None] - index) * block
    low, high = middle - (block - 1), middle + (block - 1)
    if causal:
        low = np.maximum(low, 0)
    # Where the edge of the window cuts a block off its middle, the stride lies in that block.
    holds_multiple = high // stride * stride >= low
    return jnp.asarray((low <= high) & ((np.abs(middle) < stride) | holds_multiple))


def pattern_at_density(
    name: str,
    num_blocks: int,
    *,
    density: float,
    causal: bool = False,
    num_sinks: int = 1,
    key: jax.Array | None = None,
) -> jax.Array:
    """Make the pattern of a family that keeps exactly the requested number of blocks.

    The count is round(density * visible blocks), so that patterns of different families can be
    compared at equal cost. The rule is ours. Every pattern keeps the diagonal first. The rest of
    the count is divided among the family's parts; each takes its share of the blocks not kept yet,
    in its own order, the window last:

      sliding_window  all to the window
      sink_window     the first `num_sinks` columns whole, then the window
      longformer      half to globals, half to the window
      bigbird         a third each to globals, random blocks and the window
      random          all to random blocks

    The window grows outward from the diagonal; sinks fill the first column, globals the first row
    and column, the blocks farthest from the diagonal first, then the next. Ties go in row order: a
    diagonal that the count does not fill has its first blocks.

    Args:
      name: one of `FIXED_PATTERNS`.
      num_blocks: NB, blocks per side.
      density: fraction of the visible blocks to keep; at least the diagonal's share.
      causal: whether only the lower triangle of blocks is visible.
      num_sinks: leading columns that are sinks; the other families do not use it.
      key: PRNG key of random blocks; families without them do not use it.

    Returns:
      bool[NB, NB], True = kept.

    Raises:
      ValueError: if the name is unknown, `num_blocks` is not positive, the density is above 1
        or below the share of the diagonal, `num_sinks` is not in 1 to NB, or the key that random
        blocks need is missing.

    Example:
      >>> pattern_at_density("longformer", 4, density=0.5).astype(int)
      Array([[1, 1, 0, 1],
             [1, 1, 0, 0],
             [0, 0, 1, 0],
             [1, 0, 0, 1]], dtype=int32)
    """
    _check_at_least(1, num_blocks=num_blocks)
    visible = visible_blocks(num_blocks, causal=causal)
    count = count_at_density(density, visible)
    if name not in FIXED_PATTERNS:
        raise ValueError(f"name must be one of {tuple(FIXED_PATTERNS)}, got name={name!r}")
    _check_at_least(1, num_sinks=num_sinks)
    if num_sinks > num_blocks:
        raise ValueError(f"num_sinks must be at most num_blocks={num_blocks}, got {num_sinks=}")
    kept, rest = FIXED_PATTERNS[name](
        jnp.eye(num_blocks, dtype=bool),
        count - num_blocks,
        Grid(num_blocks, visible, num_sinks, key),
    )
    return _keep_lowest(_distance(num_blocks), rest, kept, visible)


def _add_nothing(kept, rest, grid):
    del grid
    return kept, rest


def _add_sinks(kept, rest, grid):
    NB, sinks = grid.num_blocks, grid.visible[:, : grid.num_sinks]
    count = min(rest, int(sinks.sum()) - grid.num_sinks)
    farthest_first = (np.arange(NB) + 1) * NB - _distance(NB)
    return _keep_lowest(farthest_first, count, kept, grid.visible), rest - count


def _add_globals(kept, rest, grid):
    return _keep_globals(kept, rest // 2, grid), rest - rest // 2


def _add_globals_and_random_blocks(kept, rest, grid):
    third = rest // 3
    kept = _keep_globals(kept, third, grid)
    return _keep_random(kept, third, grid), rest - 2 * third


def _add_random_blocks(kept, rest, grid):
    return _keep_random(kept, rest, grid), 0


FIXED_PATTERNS: dict[str, Family] = {
    "sliding_window": _add_nothing,
    "sink_window": _add_sinks,
    "longformer": _add_globals,
    "bigbird": _add_globals_and_random_blocks,
    "random": _add_random_blocks,
}
"""The families that `pattern_at_density` knows, by name."""


def _keep_globals(kept, count, grid):
    NB = grid.num_blocks
    farthest_border_first = (_nearest_border(NB) + 1) * NB - _distance(NB)
    return _keep_lowest(farthest_border_first, count, kept, grid.visible)


def _keep_random(kept, count, grid):
    if grid.key is None:
        raise ValueError("key must be given for patterns with random blocks, got key=None")
    draws = jax.random.uniform(grid.key, kept.shape, jnp.float32)
    return _keep_lowest(draws, count, kept, grid.visible)


def _keep_lowest(
    score: jax.Array | np.ndarray, count: int, kept: jax.Array, visible: np.ndarray
) -> jax.Array:
    """Keep `count` more of the visible blocks, those of the lowest score."""
    candidates = jnp.where(visible & ~kept, score, jnp.inf).ravel()
    rank = candidates.argsort(stable=True).argsort()
    return kept | (rank < count).reshape(kept.shape)


def _distance(num_blocks: int) -> np.ndarray:
    index = np.arange(num_blocks)
    return np.abs(index[:, None] - index)


def _nearest_border(num_blocks: int) -> np.ndarray:
    index = np.arange(num_blocks)
    return np.minimum(index[:, None], index)


def _check_at_least(minimum: int, **counts: int) -> None:
    for name, value in counts.items():
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {name}={value}")
