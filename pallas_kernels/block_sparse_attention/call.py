"""What a backend of `block_sparse_attention` is given, in the forms that backends read.

Letters: B T S N K H I J as everywhere (`sparsejax.types`).
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.block_schedule import (
    BlockSchedule,
    drop_blocks_above_diagonal,
    make_block_schedule,
    unpack_block_schedule,
)


class AttentionArrays(NamedTuple):
    """Arrays of one call.

    Attributes:
      q: float[B, T, N, H], queries.
      k: float[B, S, K, H], keys; finite everywhere, as are the values; K divides N.
      v: float[B, S, K, H], values.
      blocks: bool[1 or B, 1 or N, I, J], True where a block is kept; or the BlockSchedule of such
        a mask; or None: every block.
      kv_mask: bool[B, S] or None, False removes a key.
      segment_ids: int[B, T] or None, queries see keys of their own segment.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    blocks: jax.Array | BlockSchedule | None
    kv_mask: jax.Array | None
    segment_ids: jax.Array | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionFacts:
    """Static facts of one call.

    Attributes:
      batch: int, B.
      num_queries: int, T.
      num_keys: int, S.
      num_heads: int, N.
      num_kv_heads: int, K.
      head_dim: int, H.
      dtype: str, of q, k and v.
      mask_shape: (1 or B, 1 or N), leading axes of the blocks; None: every block is kept.
      block_q: int, queries per block.
      block_kv: int, keys per block.
      causal: bool, query t sees keys 0..t.
      scale: float, factor of the logits.
      pruned_logits: "masked" or "zero"; without effect where every block is kept.
      return_lse: bool, whether the second result is needed.
    """

    batch: int
    num_queries: int
    num_keys: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    mask_shape: tuple[int, ...] | None
    block_q: int
    block_kv: int
    causal: bool
    has_kv_mask: bool
    has_segments: bool
    scale: float
    pruned_logits: str
    return_lse: bool

    DIRECTIONS: ClassVar[tuple[str, ...]] = ("forward", "gradient")

    @property
    def kernel_options(self) -> dict[str, str | int | bool]:
        """What a kernel is compiled for, sizes aside."""
        mask_batch, mask_heads = self.mask_shape or (0, 0)
        lists = ("shared", "per head", "per example", "per example and head")
        return {
            "dtype": self.dtype,
            "head_dim": self.head_dim,
            "block_q": self.block_q,
            "block_kv": self.block_kv,
            "pruned_logits": self.pruned_logits,
            "mask": lists[2 * (mask_batch > 1) + (mask_heads > 1)] if mask_heads else "none",
            "causal": self.causal,
            "kv_mask": self.has_kv_mask,
            "segments": self.has_segments,
            "grouped_queries": self.num_heads > self.num_kv_heads,
        }

    @property
    def sizes(self) -> tuple[int, ...]:
        """(B * N, T, S)."""
        return self.batch * self.num_heads, self.num_queries, self.num_keys


def make_mask(arrays: AttentionArrays) -> jax.Array | None:
    """Return the kept blocks as a mask.

    Returns:
      bool[1 or B, 1 or N, I, J], or None: every block.
    """
    if isinstance(arrays.blocks, BlockSchedule):
        return unpack_block_schedule(arrays.blocks)
    return arrays.blocks


def make_schedule(arrays: AttentionArrays, facts: AttentionFacts) -> BlockSchedule:
    """Return the kept blocks as lists.

    Returns:
      BlockSchedule with axes [1 or B, 1 or N]; if causal, without blocks above the diagonal.
    """
    schedule = arrays.blocks
    if schedule is None:
        grid = facts.num_queries // facts.block_q, facts.num_keys // facts.block_kv
        schedule = jnp.ones((1, 1, *grid), bool)
    if not isinstance(schedule, BlockSchedule):
        schedule = make_block_schedule(schedule)
    if facts.causal:
        schedule = drop_blocks_above_diagonal(
            schedule, block_q=facts.block_q, block_kv=facts.block_kv
        )
    return schedule
