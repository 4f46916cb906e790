"""Lists of blocks, sorted by length and cut into tiles that are walked together.

A tile's trip count is the length of the longest of its own lists. Sorting puts lists of like
length together, so the work is the sum of the lengths, plus at most one tile's width of the
longest list, however uneven the lengths are.

Letters: U lists, R lists of a tile, P list positions, W list positions walked at once.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.block_schedule import BlockSchedule
from pallas_kernels.block_sparse_attention.xla.folding import Fold

# Measured on CPU over blocks of 32 and 64: with fewer lists or narrower steps the overhead of
# small products tells, with more of them the padding where lengths are uneven. The backward pass
# writes out one addition per list and block of a step, hence the bound on blocks.
_LISTS_PER_TILE = 4
_POSITIONS_PER_STEP = 128
_BLOCKS_PER_STEP = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Lists in tiles. Scanned over, it yields one tile, without the first axis.

    Attributes:
      owner: int32[tiles, R], which list stands in each place, counted before sorting.
      counts: int32[tiles, R], length of each list.
      visited: int32[tiles, R, P], blocks on each list; P is a multiple of `width`.
      num_steps: int32[tiles], steps of `width` positions to the end of the longest list.
      width: int, list positions walked at once.
    """

    owner: jax.Array
    counts: jax.Array
    visited: jax.Array
    num_steps: jax.Array
    width: int = dataclasses.field(metadata={"static": True})

    def walk(self, step: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
        """Return what one tile visits in one step.

        Args:
          step: int32[], at most `num_steps` - 1.
          block: int, positions in a visited block.

        Returns:
          tuple of int32[R, W], the blocks, and bool[R, W * block], which of their positions
          belong to the list rather than to its padding.
        """
        start = step * self.width
        visited_RW = jax.lax.dynamic_slice_in_dim(self.visited, start, self.width, axis=1)
        listed_RW = start + jnp.arange(self.width) < self.counts[:, None]
        return visited_RW, jnp.repeat(listed_RW, block, axis=1)

    def restore_order(self, tiled: jax.Array) -> jax.Array:
        """Put results of all tiles back in the order of the lists.

        Args:
          tiled: [tiles, X, R, ...].

        Returns:
          [X, U, ...].
        """
        flat = jnp.moveaxis(tiled, 0, 1)
        flat = flat.reshape(flat.shape[0], -1, *flat.shape[3:])
        return flat[:, jnp.argsort(self.owner.reshape(-1))]

    def count_visited_blocks(self) -> jax.Array:
        """Return how many blocks the loops compute, padding included.

        Returns:
          int32[], for each of the batch entries and heads that share the lists.
        """
        return self.num_steps.sum() * self.owner.shape[1] * self.width


def make_query_tiles(schedule: BlockSchedule, fold: Fold, *, block_kv: int) -> Tiles:
    """Tile the lists of key blocks that each query block visits.

    Args:
      schedule: BlockSchedule with leading axes [1 or B, 1 or N].
      fold: Fold of the call.
      block_kv: int, keys per block.

    Returns:
      Tiles whose lists are the folded query blocks and whose entries are folded key blocks.
    """
    blocks = _folded_blocks(schedule.kv_indices, fold, fold.kv_heads)
    return _make_tiles(schedule.kv_counts.reshape(-1), blocks, block_kv)


def make_key_tiles(schedule: BlockSchedule, fold: Fold, *, block_q: int) -> Tiles:
    """Tile the lists of query blocks that visit each key block.

    Args:
      schedule: BlockSchedule with leading axes [1 or B, 1 or N].
      fold: Fold of the call.
      block_q: int, queries per block.

    Returns:
      Tiles with one list per mask and key block, whose entries are folded query blocks.
    """
    blocks = _folded_blocks(schedule.q_indices, fold, fold.q_heads)
    return _make_tiles(schedule.q_counts.reshape(-1), blocks, block_q)


def _folded_blocks(indices, fold, heads):
    """Blocks of one head -> blocks on the folded axis, [U, P]; `heads` are those read."""
    num_blocks = indices.shape[-1]
    num_masks = fold.batch[1] * fold.q_heads[1]
    head_read = jnp.arange(num_masks, dtype=jnp.int32) // (fold.q_heads[1] // heads[1])
    indices = indices.reshape(num_masks, -1, num_blocks) + (head_read * num_blocks)[:, None, None]
    return indices.reshape(-1, num_blocks)


def _make_tiles(counts_U, visited_UP, block):
    num_lists, num_blocks = visited_UP.shape
    lists = max(r for r in range(1, _LISTS_PER_TILE + 1) if num_lists % r == 0)
    width = max(1, min(_POSITIONS_PER_STEP // block, _BLOCKS_PER_STEP, num_blocks))
    visited_UP = jnp.pad(visited_UP, ((0, 0), (0, -num_blocks % width)))
    owner = jnp.argsort(-counts_U, stable=True).astype(jnp.int32)
    counts = counts_U[owner].reshape(-1, lists)
    return Tiles(
        owner=owner.reshape(-1, lists),
        counts=counts,
        visited=visited_UP[owner].reshape(*counts.shape, -1),
        num_steps=-(-counts.max(axis=1) // width),
        width=width,
    )
