"""How batch, heads and positions fold into the two axes that lists of blocks work on.

A mask may be shared by examples or heads, or not. What shares it becomes one batch axis, X, of
every product; what does not becomes part of the block axis, Y, so that lists of all examples and
heads can be walked together. Query heads of a group that share a mask read the same keys: they
are folded into the queries of a block.

Letters: B T S N K H as everywhere (`sparsejax.types`); X and Y as above.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.block_schedule import BlockSchedule


class Fold(NamedTuple):
    """How the batch and head axes split, each in the parts that go to X, to Y and into a block.

    Attributes:
      batch: (X, Y) parts of the batch.
      q_heads: (X, Y, block) parts of the query heads.
      kv_heads: (X, Y, block) parts of the key heads; the last is 1.
    """

    batch: tuple[int, int]
    q_heads: tuple[int, int, int]
    kv_heads: tuple[int, int, int]


def make_fold(q: jax.Array, k: jax.Array, schedule: BlockSchedule) -> Fold:
    """Choose the fold from what the mask shares.

    Args:
      q: float[B, T, N, H], queries.
      k: float[B, S, K, H], keys.
      schedule: BlockSchedule with leading axes [1 or B, 1 or N].
    """
    batch, num_heads, num_kv_heads = q.shape[0], q.shape[2], k.shape[2]
    mask_batch, mask_heads = schedule.kv_counts.shape[:2]
    shared = mask_heads == 1
    return Fold(
        batch=(batch // mask_batch, mask_batch),
        q_heads=(num_kv_heads, 1, num_heads // num_kv_heads) if shared else (1, num_heads, 1),
        kv_heads=(num_kv_heads, 1, 1) if shared else (1, num_kv_heads, 1),
    )


def fold_blocks(
    x: jax.Array, batch: tuple[int, int], heads: tuple[int, int, int], block: int
) -> jax.Array:
    """Fold an array into blocks.

    Args:
      x: [B, T, N, ...], anything that belongs to positions and heads.
      batch: parts of B.
      heads: parts of N.
      block: int, positions per block.

    Returns:
      [X, Y, heads[2] * block, ...] with Y = batch[1] * heads[1] * T / block.
    """
    num_blocks, trailing = x.shape[1] // block, x.shape[3:]
    x = x.reshape(*batch, num_blocks, block, *heads, *trailing)
    x = jnp.moveaxis(x, (0, 4, 1, 5, 2, 6, 3), range(7))
    return x.reshape(
        batch[0] * heads[0], batch[1] * heads[1] * num_blocks, heads[2] * block, *trailing
    )


def unfold_blocks(
    x: jax.Array, batch: tuple[int, int], heads: tuple[int, int, int], block: int
) -> jax.Array:
    """Undo `fold_blocks`.

    Args:
      x: [X, Y, heads[2] * block, ...].
      batch: parts of B.
      heads: parts of N.
      block: int, positions per block.

    Returns:
      [B, T, N, ...].
    """
    num_blocks, trailing = x.shape[1] // (batch[1] * heads[1]), x.shape[3:]
    x = x.reshape(batch[0], heads[0], batch[1], heads[1], num_blocks, heads[2], block, *trailing)
    x = jnp.moveaxis(x, range(7), (0, 4, 1, 5, 2, 6, 3))
    length, num_heads = num_blocks * block, heads[0] * heads[1] * heads[2]
    return x.reshape(batch[0] * batch[1], length, num_heads, *trailing)
