"""Blocks joined to large tiles, for masks that keep most of them: on a CPU.

A CPU runs large products at up to twice the rate of small ones. Blocks that lie together are joined
to tiles of up to 512 queries by 1,024 keys. A tile is computed whole if any of its blocks is kept,
and its logits are masked; so the walk is that of another, coarser schedule.

Heads are walked one by one, so that the logits of a tile take the same memory in every model.

Letters: as in `operands`; q, c: blocks of a tile, by queries and by keys.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.block_schedule import (
    BlockSchedule,
    make_block_schedule,
    unpack_block_schedule,
)
from pallas_kernels.block_sparse_attention.call import AttentionFacts

_MOST_QUERIES, _MOST_KEYS, _FEWEST = 512, 1024, 256
# Blocks of 32, 64 and 128 positions, all kept, took 2.2, 1.5 and 1.1 times as long as tiles.
_SMALL_BLOCK = 32


class Joined(NamedTuple):
    """A call with blocks joined to tiles.

    Attributes:
      facts: AttentionFacts, of the tiles.
      schedule: BlockSchedule with leading axes [B, N], of the tiles that hold a kept block.
      kept_YJqc: bool[Y, J, q, c], which of their blocks are kept.
      costs: (f32[], f32[]), of walking the lists of blocks, and of walking those of tiles.
    """

    facts: AttentionFacts
    schedule: BlockSchedule
    kept_YJqc: jax.Array
    costs: tuple[jax.Array, jax.Array]


def join_blocks(schedule: BlockSchedule, facts: AttentionFacts) -> Joined | None:
    """Join the blocks of a call.

    Args:
      schedule: BlockSchedule with leading axes [1 or B, 1 or N].

    Returns:
      Joined, or None where tiles would have fewer than 256 queries or keys, or be single blocks.
    """
    rows = _count_joined(facts.num_queries, facts.block_q, _MOST_QUERIES)
    columns = _count_joined(facts.num_keys, facts.block_kv, _MOST_KEYS)
    block_q, block_kv = rows * facts.block_q, columns * facts.block_kv
    if min(block_q, block_kv) < _FEWEST or rows * columns == 1:
        return None
    mask = unpack_block_schedule(schedule)
    mask = jnp.broadcast_to(mask, (facts.batch, facts.num_heads, *mask.shape[2:]))
    grid = facts.num_queries // block_q, facts.num_keys // block_kv
    kept = mask.reshape(*mask.shape[:2], grid[0], rows, grid[1], columns).swapaxes(3, 4)
    has_kept = kept.any(axis=(-2, -1))
    side = math.sqrt(facts.block_q * facts.block_kv)
    costs = (
        (1 + _SMALL_BLOCK / side) * mask.sum(dtype=jnp.float32),
        rows * columns * has_kept.sum(dtype=jnp.float32),
    )
    return Joined(
        facts=dataclasses.replace(facts, block_q=block_q, block_kv=block_kv),
        schedule=make_block_schedule(has_kept),
        kept_YJqc=kept.reshape(-1, *kept.shape[3:]),
        costs=costs,
    )


def _count_joined(length: int, block: int, most: int) -> int:
    """How many blocks are joined along one side: the most that divide it evenly."""
    blocks = length // block
    counts = range(1, max(1, most // block) + 1)
    return max(count for count in counts if blocks % count == 0)
