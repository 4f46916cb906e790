"""Block lists as the Hopper kernels read them: flat, with masked tiles apart, and in which order.

A *tile block* is what one step of a list covers. It is a block of the pattern, or four blocks of
32 by 32 positions (two, if one side is wider): tensor cores work on 64 rows at a time. Which of
its blocks a tile keeps then stands in the low bits of its entry.

Letters: B N K I J as everywhere (`sparsejax.types`); M masks that differ, over batch and heads;
U units, the lists of all masks; P list positions.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_lists import find_listed, number_entries
from pallas_kernels.block_sparse_attention.block_schedule import (
    BlockSchedule,
    make_block_schedule,
    unpack_block_schedule,
)

BITS = 16
"""An entry is `block index * BITS + kept bits`; bit `2 * a + b` is the tile's block in row a,
column b."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TileLists:
    """Lists of all units, in GPU memory.

    Attributes:
      counts: int32[U], tile blocks on each list.
      num_leading: int32[U], how many stand before those of the other kind: the lists of query
        blocks begin with tiles that need no mask, those of key blocks with tiles that need one.
      entries: int32[U, P], see `BITS`.
      order: int32[copies * U], in which order they are to be walked, see `make_order`.
    """

    counts: jax.Array
    num_leading: jax.Array
    entries: jax.Array
    order: jax.Array

    def list_heads(self) -> jax.Array:
        """List what a program must know to begin with a list, so that one read finds it all.

        Returns:
          int32[copies * U, 4], in the order: the number of the list, its length, how many are
          leading, and its first entry.
        """
        unit = self.order % self.counts.size
        facts = self.order, self.counts[unit], self.num_leading[unit], self.entries[unit, 0]
        return jnp.stack(facts, axis=-1)


class Grain(NamedTuple):
    """How tile blocks lie in a pattern.

    Attributes:
      block_q: int, queries of a tile block.
      block_kv: int, keys of a tile block.
      rows: int, blocks of the pattern that share a tile block, one below the other.
      columns: int, the same side by side.
    """

    block_q: int
    block_kv: int
    rows: int
    columns: int


def make_grain(block_q: int, block_kv: int) -> Grain:
    """Choose the tile blocks of a pattern.

    Args:
      block_q: int, queries of a block of the pattern.
      block_kv: int, keys of a block of the pattern.

    Returns:
      Grain: blocks of 32 in pairs, others as they are.

    Example:
      >>> make_grain(32, 128)
      Grain(block_q=64, block_kv=128, rows=2, columns=1)
    """
    rows, columns = (2 if block == 32 else 1 for block in (block_q, block_kv))
    return Grain(rows * block_q, columns * block_kv, rows, columns)


def make_query_lists(
    schedule: BlockSchedule, grain: Grain, *, causal: bool, all_masked: bool, copies: int = 1
) -> TileLists:
    """List the tile blocks of keys that each tile block of queries visits.

    Args:
      schedule: BlockSchedule of the pattern, axes [1 or B, 1 or N]; if causal, without blocks
        above the diagonal.
      grain: Grain of the pattern.
      causal: bool, tiles that the diagonal crosses need a mask.
      all_masked: bool, every tile needs a mask.
      copies: int, how often the lists of all masks are walked, each time for other heads or
        examples.

    Returns:
      TileLists of U = M * I units, tiles without a mask first.
    """
    schedule, bits = _coarsen(schedule, grain)
    counts, indices = schedule.kv_counts, schedule.kv_indices
    clear = _count_listed(counts, indices, lambda i, j: _below_diagonal(i, j, grain))
    return _pack(counts, indices, bits, _leading(counts, clear, causal, all_masked), copies)


def make_key_lists(
    schedule: BlockSchedule,
    grain: Grain,
    *,
    causal: bool,
    all_masked: bool,
    group: int,
    copies: int = 1,
) -> TileLists:
    """List the tile blocks of queries that visit each tile block of keys.

    Where the query heads of a key head have masks of their own, the lists of `group` of them at a
    time are joined: index `g * I + i` is block i of head g of these.

    Args:
      schedule: as for `make_query_lists`.
      grain: Grain of the pattern.
      causal: bool, tiles that the diagonal crosses need a mask.
      all_masked: bool, every tile needs a mask.
      group: int, if masks differ by head, the query heads of a key head or an equal part of them;
        else 1.
      copies: int, as for `make_query_lists`.

    Returns:
      TileLists of U = M / group * J units, tiles with a mask first.
    """
    schedule, bits = _coarsen(schedule, grain)
    counts, indices = schedule.q_counts, schedule.q_indices
    bits = None if bits is None else bits.swapaxes(-1, -2)
    crossed = _count_listed(counts, indices, lambda j, i: ~_below_diagonal(i, j, grain))
    leading = _leading(counts, crossed, causal, all_masked, masked_first=True)
    if group > 1:
        counts, indices, bits, leading = _join_heads(counts, indices, bits, leading, group)
    return _pack(counts, indices, bits, leading, copies)


def make_order(counts: jax.Array, copies: int) -> jax.Array:
    """Order lists so that none is started late, and neighbours stay together where they can.

    The longest come first. Of equal lists, those of one copy come before those of the next, each in
    the order of its blocks: where all are equal, a head's keys stay in the cache while it is worked
    on.

    Args:
      counts: int32[U], lengths.
      copies: int, how often each list is walked.

    Returns:
      int32[copies * U], numbers `copy * U + unit`.

    Example:
      >>> make_order(jnp.array([3, 1, 3]), 2).tolist()
      [0, 2, 3, 5, 1, 4]
    """
    return jnp.argsort(-jnp.tile(counts, copies), stable=True).astype(jnp.int32)


def _coarsen(schedule, grain):
    """Return the schedule of tile blocks and bits int32[..., I, J], None for whole blocks."""
    if grain.rows == grain.columns == 1:
        return schedule, None
    mask = unpack_block_schedule(schedule)
    *leading, rows, columns = mask.shape
    split = (rows // grain.rows, grain.rows, columns // grain.columns, grain.columns)
    parts = mask.reshape(*leading, *split).astype(jnp.int32)
    place = 2 * number_entries(parts, axis=-3) + number_entries(parts, axis=-1)
    bits = (parts << place).sum(axis=(-3, -1), dtype=jnp.int32)
    return make_block_schedule(bits > 0), bits


def _below_diagonal(i, j, grain):
    """Whether every query of block i sees every key of block j under a causal mask."""
    return (j + 1) * grain.block_kv <= i * grain.block_q + 1


def _count_listed(counts, indices, condition):
    """Count the entries (own block, other block) of each list that meet a condition."""
    listed = find_listed(counts, indices.shape[-1])
    own = number_entries(indices, axis=-2)
    return (listed & condition(own, indices)).sum(axis=-1, dtype=jnp.int32)


def _leading(counts, found, causal, all_masked, *, masked_first=False):
    if all_masked:
        return counts if masked_first else jnp.zeros_like(counts)
    if causal:
        return found
    return jnp.zeros_like(counts) if masked_first else counts


def _join_heads(counts, indices, bits, leading, group):
    """Join the lists of the heads of a group, [B, N, J, I] -> [B, N / group, J, group * I]."""

    def by_group(x):
        return jnp.moveaxis(x.reshape(x.shape[0], -1, group, *x.shape[2:]), 2, 3)

    num_queries = indices.shape[-1]
    indices = by_group(indices)
    heads = number_entries(indices, axis=-2) * num_queries
    listed = find_listed(by_group(counts), num_queries)
    second = ~find_listed(by_group(leading), num_queries)
    rank = jnp.where(listed, second.astype(jnp.int32), 2)
    flat = (*rank.shape[:3], group * num_queries)
    order = jnp.argsort(rank.reshape(flat), axis=-1, stable=True)
    joined = jnp.take_along_axis((indices + heads).reshape(flat), order, axis=-1)
    if bits is not None:
        bits = by_group(bits).reshape(flat)
    return by_group(counts).sum(axis=-1), joined, bits, by_group(leading).sum(axis=-1)


def _pack(counts, indices, bits, leading, copies):
    entries = indices * BITS
    if bits is not None:
        entries += jnp.take_along_axis(bits, indices, axis=-1)
    return TileLists(
        counts=counts.reshape(-1),
        num_leading=leading.reshape(-1),
        entries=entries.reshape(-1, entries.shape[-1]),
        order=make_order(counts.reshape(-1), copies),
    )
