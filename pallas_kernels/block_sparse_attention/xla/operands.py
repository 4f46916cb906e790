"""Folded inputs of one call, and the logits of the blocks that a step visits.

Letters: B T S N K H I J as everywhere (`sparsejax.types`), and, after folding,
  X batch and heads that share a list   Y blocks, over all batches and heads that do not share
  Q queries of a block (times the query heads of a group)   C keys of a block
  R lists of a tile   W list positions walked at once
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_lists import Tile, gather_blocks
from pallas_kernels.block_sparse_attention.block_schedule import BlockSchedule
from pallas_kernels.block_sparse_attention.call import AttentionArrays, AttentionFacts
from pallas_kernels.block_sparse_attention.xla.folding import Fold, fold_blocks, make_fold

matmul = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class KeyVisit(NamedTuple):
    """What the query blocks of a tile meet in one step.

    Attributes:
      k_XRCH: float[X, R, W * C, H], keys visited.
      v_XRCH: float[X, R, W * C, H], values visited.
      s_XRQC: f32[X, R, Q, W * C], logits; -inf where a key does not enter the softmax.
      listed_RQC: bool[R, Q or 1, W * C], which queries keep which keys; False in a list's padding.
      reach: bool[1 or X, R, Q, W * C], which queries see which keys, pruning and key mask aside;
        None: all of them.
    """

    k_XRCH: jax.Array
    v_XRCH: jax.Array
    s_XRQC: jax.Array
    listed_RQC: jax.Array
    reach: jax.Array | None


class Operands(NamedTuple):
    """Folded inputs of one call; the arrays typed None are so where the call has none.

    Attributes:
      fold: Fold of the call.
      kept_YJqc: bool[Y, J, q, c], which blocks of the mask are kept where the blocks of the call
        are several of them joined, see `joining`.
      grid: (I, J), blocks of queries and keys.
      facts: AttentionFacts of the call.
    """

    q_XYQH: jax.Array
    k_XYCH: jax.Array
    v_XYCH: jax.Array
    kv_mask_XYC: jax.Array | None
    q_segments_XYQ: jax.Array | None
    kv_segments_XYC: jax.Array | None
    kept_YJqc: jax.Array | None
    fold: Fold
    grid: tuple[int, int]
    facts: AttentionFacts

    def visit_keys(self, tile: Tile, q_XRQH: jax.Array, step: jax.Array) -> KeyVisit:
        """Return what the query blocks of a tile meet in one step.

        Args:
          tile: Tile of query blocks.
          q_XRQH: float[X, R, Q, H], its queries.
          step: int32[], at most `tile.num_steps` - 1.
        """
        visited_RW, listed_RC = tile.walk(step, self.facts.block_kv)
        own_R1 = tile.owner[:, None]
        listed_RQC = self.find_kept(own_R1, visited_RW, listed_RC[:, None, :])
        k_XRCH = gather_blocks(self.k_XYCH, visited_RW)
        v_XRCH = gather_blocks(self.v_XYCH, visited_RW)
        reach = self.find_reach(own_R1, visited_RW)
        attended = self.find_attended(reach, visited_RW, listed_RQC)
        s = matmul("xrqh,xrch->xrqc", q_XRQH, k_XRCH) * self.facts.scale
        return KeyVisit(k_XRCH, v_XRCH, jnp.where(attended, s, -jnp.inf), listed_RQC, reach)

    def find_kept(
        self, q_blocks_RW: jax.Array, kv_blocks_RW: jax.Array, listed: jax.Array
    ) -> jax.Array:
        """Which queries keep which keys.

        Args:
          q_blocks_RW: int32[R, W or 1], folded query blocks.
          kv_blocks_RW: int32[R, W or 1], folded key blocks.
          listed: bool[R, Q or 1, C or 1], which positions belong to the lists.

        Returns:
          bool[R, Q or 1, C or 1], Q and C each of one block or of W.
        """
        if self.kept_YJqc is None:
            return listed
        columns_RW = kv_blocks_RW % self.grid[1]
        kept = self.kept_YJqc[q_blocks_RW[:, :, None], columns_RW[:, None, :]].swapaxes(2, 3)
        lists, num_q, rows, num_kv, columns = kept.shape
        kept = kept.reshape(lists, num_q * rows, num_kv * columns)
        kept = kept.repeat(self.facts.block_q // rows, 1)
        return listed & kept.repeat(self.facts.block_kv // columns, 2)

    def find_reach(self, q_blocks_RW: jax.Array, kv_blocks_RW: jax.Array) -> jax.Array | None:
        """Which queries see which keys, pruning and key mask aside.

        Args:
          q_blocks_RW: int32[R, W or 1], folded query blocks.
          kv_blocks_RW: int32[R, W or 1], folded key blocks.

        Returns:
          bool[1 or X, R, Q, C], each of one block or of W, or None: all of them.
        """
        reach = None
        if self.facts.causal:
            (num_q, num_kv), block_q = self.grid, self.facts.block_q
            group = self.q_XYQH.shape[2] // block_q
            offsets = jnp.tile(jnp.arange(block_q), group)
            lists = q_blocks_RW.shape[0]
            q_at = (q_blocks_RW % num_q)[..., None] * block_q + offsets[None, None]
            block_kv = self.facts.block_kv
            offsets = jnp.arange(block_kv)
            kv_at = (kv_blocks_RW % num_kv)[..., None] * block_kv + offsets[None, None]
            q_at, kv_at = q_at.reshape(lists, -1, 1), kv_at.reshape(lists, 1, -1)
            reach = (q_at >= kv_at)[None]
        if self.q_segments_XYQ is not None and self.kv_segments_XYC is not None:
            q_segments = gather_blocks(self.q_segments_XYQ, q_blocks_RW)
            kv_segments = gather_blocks(self.kv_segments_XYC, kv_blocks_RW)
            same = q_segments[..., :, None] == kv_segments[..., None, :]
            reach = same if reach is None else reach & same
        return reach

    def find_attended(
        self, reach: jax.Array | None, kv_blocks_RW: jax.Array, listed: jax.Array
    ) -> jax.Array:
        """Which logits enter the softmax.

        Args:
          reach: of `find_reach`.
          kv_blocks_RW: int32[R, W or 1], folded key blocks.
          listed: bool[R, Q or 1, C or 1], which positions belong to the lists.

        Returns:
          bool[1 or X, R, Q or 1, C or 1].
        """
        attended = listed[None] if reach is None else reach & listed[None]
        if self.kv_mask_XYC is not None:
            attended &= gather_blocks(self.kv_mask_XYC, kv_blocks_RW)[..., None, :]
        return attended


def fold_operands(
    arrays: AttentionArrays,
    schedule: BlockSchedule,
    facts: AttentionFacts,
    kept_YJqc: jax.Array | None = None,
) -> Operands:
    """Fold the inputs of one call.

    Args:
      schedule: BlockSchedule with leading axes [1 or B, 1 or N].
      kept_YJqc: see `Operands`.
    """
    fold = make_fold(arrays.q, arrays.k, schedule)

    def queries(x_BTN_):
        return fold_blocks(x_BTN_, fold.batch, fold.q_heads, facts.block_q)

    def keys(x_BSK_):
        return fold_blocks(x_BSK_, fold.batch, fold.kv_heads, facts.block_kv)

    def per_head(x_BT, heads):
        return jnp.broadcast_to(x_BT[..., None], (*x_BT.shape, heads))

    kv_mask, segments = arrays.kv_mask, arrays.segment_ids
    heads, kv_heads = facts.num_heads, facts.num_kv_heads
    return Operands(
        q_XYQH=queries(arrays.q),
        k_XYCH=keys(arrays.k),
        v_XYCH=keys(arrays.v),
        kv_mask_XYC=None if kv_mask is None else keys(per_head(kv_mask, kv_heads)),
        q_segments_XYQ=None if segments is None else queries(per_head(segments, heads)),
        kv_segments_XYC=None if segments is None else keys(per_head(segments, kv_heads)),
        kept_YJqc=kept_YJqc,
        fold=fold,
        grid=(schedule.kv_indices.shape[-2], schedule.kv_indices.shape[-1]),
        facts=facts,
    )
