"""The output: query blocks stay, the key blocks on their lists come by.

Letters: as in `operands`; T S of `sparsejax.types`.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.block_lists import walk_lists, walk_tiles
from pallas_kernels.block_sparse_attention.block_schedule import BlockSchedule
from pallas_kernels.block_sparse_attention.call import AttentionArrays, AttentionFacts
from pallas_kernels.block_sparse_attention.softmax_rules import add_zero_logits, count_visible
from pallas_kernels.block_sparse_attention.xla.folding import unfold_blocks
from pallas_kernels.block_sparse_attention.xla.operands import fold_operands, matmul
from pallas_kernels.block_sparse_attention.xla.tiles import make_query_tiles
from pallas_kernels.meshes import vary_like

_LOWEST = float(jnp.finfo(jnp.float32).min)


def attend(
    arrays: AttentionArrays,
    schedule: BlockSchedule,
    facts: AttentionFacts,
    *,
    parallel: bool,
    kept_YJqc: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attend to the blocks on the lists.

    Args:
      schedule: BlockSchedule with leading axes [1 or B, 1 or N], without blocks above the
        diagonal if causal.
      parallel: bool, the form for a GPU.
      kept_YJqc: see `Operands`.

    Returns:
      tuple of out, shaped and typed like q, and lse f32[B, T, N].
    """
    operands = fold_operands(arrays, schedule, facts, kept_YJqc)
    tiles = make_query_tiles(schedule, operands.fold, facts, parallel=parallel)
    count_kept = facts.pruned_logits == "zero"

    def advance(_, state, tile):
        q_XRQH = operands.q_XYQH[:, tile.owner]

        def step(index, state):
            top, total, acc, kept = state
            visit = operands.visit_keys(tile, q_XRQH, index)
            new_top = jnp.maximum(top, visit.s_XRQC.max(axis=-1))
            shrink = jnp.exp(top - new_top)
            p = jnp.exp(visit.s_XRQC - new_top[..., None])
            pv = matmul("xrqc,xrch->xrqh", p.astype(arrays.v.dtype), visit.v_XRCH)
            if count_kept:
                seen = visit.listed_RQC[None]
                if visit.reach is not None:
                    seen = visit.reach & seen
                kept = kept + seen.sum(axis=-1, dtype=jnp.int32)
            return new_top, total * shrink + p.sum(axis=-1), acc * shrink[..., None] + pv, kept

        return None, jax.lax.fori_loop(0, tile.num_steps, step, state)

    def walk(_, tile):
        shared, _, queries, dim = operands.q_XYQH.shape
        rows = shared, tile.owner.shape[0], queries
        # A finite start keeps a row that never sees a key clear of inf - inf.
        start = (
            jnp.full(rows, _LOWEST, jnp.float32),
            jnp.zeros(rows, jnp.float32),
            jnp.zeros((*rows, dim), jnp.float32),
            jnp.zeros(rows, jnp.int32),
        )
        start = vary_like(start, operands.q_XYQH)
        _, (top, total, acc, kept) = walk_lists(advance, None, start, tile)
        some = total > 0
        out = acc * jnp.where(some, 1 / total, 0.0)[..., None]
        return None, (out, jnp.where(some, top + jnp.log(total), -jnp.inf), kept)

    _, results = walk_tiles(walk, None, tiles)
    fold = operands.fold
    out, lse, kept = (unfold_blocks(x, fold.batch, fold.q_heads, facts.block_q) for x in results)
    if count_kept:
        visible_BT = count_visible(
            facts.num_queries, facts.num_keys, causal=facts.causal, segment_ids=arrays.segment_ids
        )
        out, lse = add_zero_logits(out, lse, visible_BT[..., None] - kept)
    return out.astype(arrays.q.dtype), lse
