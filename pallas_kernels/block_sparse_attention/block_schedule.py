"""Block masks as lists: which key blocks each query block visits, and the reverse.

A loop over lists does work in proportion to the kept blocks and needs no bound on how many there
are, because the lists are as long as a full row and only their counts change.

Letters: I query blocks, J key blocks.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.block_lists import find_listed, list_kept, number_entries


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSchedule:
    """The kept blocks of a mask, listed by query block and by key block.

    Every row of `kv_indices` is a permutation of the J key blocks: the kept ones in ascending
    order, then the pruned ones. `q_indices` likewise. Leading axes, if any, are those of the mask:
    batch and heads, before them layers when schedules of stacked layers are scanned over.

    Attributes:
      kv_counts: int32[..., I], key blocks kept in each row of the mask.
      kv_indices: int32[..., I, J], key blocks of each query block, kept ones first.
      q_counts: int32[..., J], query blocks kept in each column of the mask.
      q_indices: int32[..., J, I], query blocks of each key block, kept ones first.
    """

    kv_counts: jax.Array
    kv_indices: jax.Array
    q_counts: jax.Array
    q_indices: jax.Array


def make_block_schedule(mask: jax.Array) -> BlockSchedule:
    """List the kept blocks of a mask by row and by column.

    Plain array code: it may be jitted, vmapped, and called on masks of stacked layers at once.
    Build it once per mask update rather than once per step.

    Args:
      mask: bool[..., I, J], True where a block is kept.

    Returns:
      BlockSchedule with the leading axes of `mask`.

    Raises:
      ValueError: if `mask` is not boolean or has fewer than two axes.

    Example:
      >>> schedule = make_block_schedule(jnp.array([[True, False], [True, True]]))
      >>> schedule.kv_counts.tolist(), schedule.q_counts.tolist()
      ([1, 2], [2, 1])
      >>> schedule.kv_indices.tolist()
      [[0, 1], [0, 1]]
    """
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_ or mask.ndim < 2:
        raise ValueError(
            f"mask must be bool[..., I, J], got mask.dtype={mask.dtype}, mask.shape={mask.shape}"
        )
    kv_counts, kv_indices = list_kept(mask)
    q_counts, q_indices = list_kept(mask.swapaxes(-1, -2))
    return BlockSchedule(
        kv_counts=kv_counts, kv_indices=kv_indices, q_counts=q_counts, q_indices=q_indices
    )


def unpack_block_schedule(schedule: BlockSchedule) -> jax.Array:
    """Return the mask that a schedule lists.

    Returns:
      bool[..., I, J], True where a block is kept.

    Example:
      >>> mask = jnp.array([[True, False], [True, True]])
      >>> bool((unpack_block_schedule(make_block_schedule(mask)) == mask).all())
      True
    """
    listed = find_listed(schedule.kv_counts, schedule.kv_indices.shape[-1])
    position_of_block = jnp.argsort(schedule.kv_indices, axis=-1)
    return jnp.take_along_axis(listed, position_of_block, axis=-1)


def drop_blocks_above_diagonal(
    schedule: BlockSchedule, *, block_q: int, block_kv: int
) -> BlockSchedule:
    """Remove the blocks in which no query may see a key under a causal mask.

    Block (i, j) stays iff its last query is not before its first key:
    (i + 1) * block_q > j * block_kv. Lists ascend, so a row keeps a prefix of its list and a
    column a suffix; no list is sorted again.

    Args:
      block_q: int, queries per block.
      block_kv: int, keys per block.

    Returns:
      BlockSchedule that lists no block entirely above the diagonal.

    Example:
      >>> full = make_block_schedule(jnp.ones((2, 2), bool))
      >>> causal = drop_blocks_above_diagonal(full, block_q=16, block_kv=16)
      >>> causal.kv_counts.tolist(), causal.q_counts.tolist(), causal.q_indices.tolist()
      ([1, 2], [2, 1], [[0, 1], [1, 0]])
    """
    num_q, num_kv = schedule.kv_indices.shape[-2:]

    listed = find_listed(schedule.kv_counts, num_kv)
    row = number_entries(schedule.kv_indices, axis=-2)
    seen = listed & (schedule.kv_indices * block_kv < (row + 1) * block_q)

    listed_t = find_listed(schedule.q_counts, num_q)
    column = number_entries(schedule.q_indices, axis=-2)
    unseen_t = listed_t & ((schedule.q_indices + 1) * block_q <= column * block_kv)
    first_seen = unseen_t.sum(axis=-1, dtype=jnp.int32)
    rolled = (number_entries(schedule.q_indices, axis=-1) + first_seen[..., None]) % num_q
    return BlockSchedule(
        kv_counts=seen.sum(axis=-1, dtype=jnp.int32),
        kv_indices=schedule.kv_indices,
        q_counts=schedule.q_counts - first_seen,
        q_indices=jnp.take_along_axis(schedule.q_indices, rolled, axis=-1),
    )
