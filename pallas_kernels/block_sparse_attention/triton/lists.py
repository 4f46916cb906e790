"""Block lists as the Triton kernels read them: masked blocks apart, and an order to start in.

Letters: B N K I J as everywhere (`sparsejax.types`); U units, the lists of all masks, those of the
query heads of a key head joined.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.block_lists import find_listed, number_entries
from pallas_kernels.block_sparse_attention.block_schedule import BlockSchedule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Lists:
    """Lists of one side; leading axes are [1 or B, 1 or N].

    Attributes:
      counts: int32[..., I or J], blocks on each list.
      leading: int32[..., I or J], how many stand before those of the other kind: lists of query
        blocks begin with blocks that need no mask, lists of key blocks with blocks that need one.
      indices: int32[..., I or J, J or I], the blocks, those on the list first.
    """

    counts: jax.Array
    leading: jax.Array
    indices: jax.Array


def make_query_lists(
    schedule: BlockSchedule, *, block_q: int, block_kv: int, causal: bool, all_masked: bool
) -> Lists:
    """List the key blocks that each query block visits, those without a mask first.

    Args:
      schedule: BlockSchedule with leading axes [1 or B, 1 or N]; if causal, without blocks above
        the diagonal.
      block_q: int, queries per block.
      block_kv: int, keys per block.
      causal: bool, blocks that the diagonal crosses need a mask.
      all_masked: bool, every block needs a mask.
    """
    counts, indices = schedule.kv_counts, schedule.kv_indices
    if all_masked or not causal:
        leading = jnp.zeros_like(counts) if all_masked else counts
        return Lists(counts=counts, leading=leading, indices=indices)
    own = number_entries(indices, axis=-2)
    # Lists ascend: what lies below the diagonal comes first.
    clear = (indices + 1) * block_kv <= own * block_q + 1
    return Lists(counts=counts, leading=_count(counts, indices, clear), indices=indices)


def make_key_lists(
    schedule: BlockSchedule, *, block_q: int, block_kv: int, causal: bool, all_masked: bool
) -> Lists:
    """List the query blocks that visit each key block, those with a mask first.

    Args:
      schedule: as for `make_query_lists`.
      block_q: int, queries per block.
      block_kv: int, keys per block.
      causal: bool, as for `make_query_lists`.
      all_masked: bool, as for `make_query_lists`.
    """
    counts, indices = schedule.q_counts, schedule.q_indices
    if all_masked or not causal:
        leading = counts if all_masked else jnp.zeros_like(counts)
        return Lists(counts=counts, leading=leading, indices=indices)
    own = number_entries(indices, axis=-2)
    crossed = (own + 1) * block_kv > indices * block_q + 1
    return Lists(counts=counts, leading=_count(counts, indices, crossed), indices=indices)


def make_order(counts: jax.Array, *, heads: int) -> jax.Array:
    """Order units so that no long list is started late.

    Args:
      counts: int32[1 or B, 1 or N, I or J], lengths.
      heads: int, heads that own lists: N, or K of dK and dV, whose query heads are walked together.

    Returns:
      int32[U], units in the order in which they are to be started, U = [1 or B, 1 or heads, I or J]
      flattened.

    Example:
      >>> make_order(jnp.array([[[3, 1, 4]]]), heads=8).tolist()
      [2, 0, 1]
      >>> make_order(jnp.array([[[1], [2], [5], [3]]]), heads=2).tolist()
      [1, 0]
    """
    if counts.shape[1] > 1:
        counts = counts.reshape(counts.shape[0], heads, -1, counts.shape[2]).sum(axis=2)
    return jnp.argsort(-counts.reshape(-1), stable=True).astype(jnp.int32)


def _count(counts, indices, condition):
    listed = find_listed(counts, indices.shape[-1])
    return (listed & condition).sum(axis=-1, dtype=jnp.int32)
