"""The two sets of lists of a schedule, on the folded axes, in tiles.

Letters: U lists, P list positions.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.block_lists import Tile, make_tiles
from pallas_kernels.block_sparse_attention.block_schedule import BlockSchedule
from pallas_kernels.block_sparse_attention.call import AttentionFacts
from pallas_kernels.block_sparse_attention.xla.folding import Fold


def make_query_tiles(
    schedule: BlockSchedule, fold: Fold, facts: AttentionFacts, *, parallel: bool
) -> Tile | tuple[Tile, ...]:
    """Tile the lists of key blocks that each query block visits.

    Args:
      schedule: BlockSchedule with leading axes [1 or B, 1 or N].
      fold: Fold of the call.
      parallel: bool, few large tiles instead of many small ones.

    Returns:
      tiles whose lists are the folded query blocks and whose entries are folded key blocks.
    """
    blocks_UP = _fold_indices(schedule.kv_indices, fold, fold.kv_heads)
    counts_U = schedule.kv_counts.reshape(-1)
    return make_tiles(
        counts_U, blocks_UP, block=facts.block_kv, own_block=facts.block_q, parallel=parallel
    )


def make_key_tiles(
    schedule: BlockSchedule, fold: Fold, facts: AttentionFacts, *, parallel: bool
) -> Tile | tuple[Tile, ...]:
    """Tile the lists of query blocks that visit each key block.

    Args:
      schedule: BlockSchedule with leading axes [1 or B, 1 or N].
      fold: Fold of the call.
      parallel: bool, few large tiles instead of many small ones.

    Returns:
      tiles with one list per mask and key block, whose entries are folded query blocks.
    """
    blocks_UP = _fold_indices(schedule.q_indices, fold, fold.q_heads)
    counts_U = schedule.q_counts.reshape(-1)
    return make_tiles(
        counts_U, blocks_UP, block=facts.block_q, own_block=facts.block_kv, parallel=parallel
    )


def _fold_indices(indices: jax.Array, fold: Fold, heads: tuple[int, int, int]) -> jax.Array:
    """Blocks of one head -> blocks on the folded axis, [U, P]; `heads` are those read."""
    num_blocks = indices.shape[-1]
    num_masks = fold.batch[1] * fold.q_heads[1]
    head_read = jnp.arange(num_masks, dtype=jnp.int32) // (fold.q_heads[1] // heads[1])
    indices = indices.reshape(num_masks, -1, num_blocks) + (head_read * num_blocks)[:, None, None]
    return indices.reshape(-1, num_blocks)
