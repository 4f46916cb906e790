"""Portable block-sparse attention in plain JAX, with work in proportion to the kept blocks.

Lists of blocks that one query block (forward) or one key block (backward) visits are sorted by
length and cut into tiles of a few lists. A tile walks its lists a few blocks at a time, and its
trip count is a traced value: the longest of *its own* lists. So a row that keeps every block
costs only its own tile, no capacity is fixed, and a new mask needs no compilation. Softmax is
online (running maximum and sum); the backward pass computes the logits again from the saved
log-sum-exp, so memory grows with the length and not with its square.

Heads and examples that share one mask are one batch axis of every product. When masks differ,
the lists of all heads and examples are sorted and tiled together.

Letters: B T S N K H I J as everywhere (`sparsejax.types`), and, after folding,
  X batch and heads that share a list   Y blocks, over all batches and heads that do not share
  Q queries of a block (times the query heads of a group)   C keys of a block
  U lists   R lists of a tile   P list positions   W list positions walked at once
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.call import (
    AttentionArrays,
    AttentionFacts,
    make_schedule,
)
from pallas_kernels.block_sparse_attention.softmax_rules import add_zero_logits, count_visible
from pallas_kernels.block_sparse_attention.xla.folding import (
    fold_blocks,
    gather_blocks,
    make_fold,
    unfold_blocks,
)
from pallas_kernels.block_sparse_attention.xla.tiles import make_key_tiles, make_query_tiles

_LOWEST = float(jnp.finfo(jnp.float32).min)


class _Operands(NamedTuple):
    """Folded inputs; the last three are None where the call has none."""

    q_XYQH: jax.Array
    k_XYCH: jax.Array
    v_XYCH: jax.Array
    kv_mask_XYC: jax.Array | None
    q_segments_XYQ: jax.Array | None
    kv_segments_XYC: jax.Array | None


def _fold_operands(q, k, v, kv_mask, segment_ids, fold, facts) -> _Operands:
    def queries(x_BTN_):
        return fold_blocks(x_BTN_, fold.batch, fold.q_heads, facts.block_q)

    def keys(x_BSK_):
        return fold_blocks(x_BSK_, fold.batch, fold.kv_heads, facts.block_kv)

    def per_head(x_BT, heads):
        return jnp.broadcast_to(x_BT[..., None], (*x_BT.shape, heads))

    return _Operands(
        queries(q),
        keys(k),
        keys(v),
        None if kv_mask is None else keys(per_head(kv_mask, k.shape[2])),
        None if segment_ids is None else queries(per_head(segment_ids, q.shape[2])),
        None if segment_ids is None else keys(per_head(segment_ids, k.shape[2])),
    )


def _reach(operands, q_blocks_RW, kv_blocks_RW, grid, facts):
    """Which queries see which keys, pruning and key mask aside: [1 or X, R, Q, C] or None."""
    reach = None
    if facts.causal:
        num_q, num_kv = grid
        group = operands.q_XYQH.shape[2] // facts.block_q
        offsets = jnp.tile(jnp.arange(facts.block_q), group)
        lists = q_blocks_RW.shape[0]
        q_at = ((q_blocks_RW % num_q)[..., None] * facts.block_q + offsets).reshape(lists, -1)
        offsets = jnp.arange(facts.block_kv)
        kv_at = ((kv_blocks_RW % num_kv)[..., None] * facts.block_kv + offsets).reshape(lists, -1)
        reach = (q_at[:, :, None] >= kv_at[:, None, :])[None]
    if operands.q_segments_XYQ is not None:
        q_segments = gather_blocks(operands.q_segments_XYQ, q_blocks_RW)
        kv_segments = gather_blocks(operands.kv_segments_XYC, kv_blocks_RW)
        same = q_segments[..., :, None] == kv_segments[..., None, :]
        reach = same if reach is None else reach & same
    return reach


def _attended(operands, reach, kv_blocks_RW, listed):
    """Which logits enter the softmax; `listed` is [R, Q or 1, C or 1]."""
    attended = listed[None] if reach is None else reach & listed
    if operands.kv_mask_XYC is not None:
        attended &= gather_blocks(operands.kv_mask_XYC, kv_blocks_RW)[..., None, :]
    return attended


_matmul = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _forward(q, k, v, schedule, kv_mask, segment_ids, facts):
    """Return out like q and lse f32[B, T, N]."""
    fold = make_fold(q, k, schedule)
    grid = schedule.kv_indices.shape[-2:]
    operands = _fold_operands(q, k, v, kv_mask, segment_ids, fold, facts)
    tiles = make_query_tiles(schedule, fold, block_kv=facts.block_kv)
    count_kept = facts.pruned_logits == "zero"

    def walk(_, tile):
        q_XRQH = operands.q_XYQH[:, tile.owner]

        def step(index, state):
            top, total, acc, kept = state
            visited_RW, listed = tile.walk(index, facts.block_kv)
            k_XRCH = gather_blocks(operands.k_XYCH, visited_RW)
            v_XRCH = gather_blocks(operands.v_XYCH, visited_RW)
            reach = _reach(operands, tile.owner[:, None], visited_RW, grid, facts)
            attended = _attended(operands, reach, visited_RW, listed[:, None, :])
            s = _matmul("xrqh,xrch->xrqc", q_XRQH, k_XRCH) * facts.scale
            s = jnp.where(attended, s, -jnp.inf)
            new_top = jnp.maximum(top, s.max(axis=-1))
            shrink = jnp.exp(top - new_top)
            p = jnp.exp(s - new_top[..., None])
            pv = _matmul("xrqc,xrch->xrqh", p.astype(v.dtype), v_XRCH)
            if count_kept:
                seen = listed[None, :, None, :] if reach is None else reach & listed[:, None, :]
                kept = kept + seen.sum(axis=-1, dtype=jnp.int32)
            return new_top, total * shrink + p.sum(axis=-1), acc * shrink[..., None] + pv, kept

        rows = q_XRQH.shape[:-1]
        # A finite start keeps a row that never sees a key clear of inf - inf.
        start = (
            jnp.full(rows, _LOWEST, jnp.float32),
            jnp.zeros(rows, jnp.float32),
            jnp.zeros(q_XRQH.shape, jnp.float32),
            jnp.zeros(rows, jnp.int32),
        )
        top, total, acc, kept = jax.lax.fori_loop(0, tile.num_steps, step, start)
        some = total > 0
        out = acc * jnp.where(some, 1 / total, 0.0)[..., None]
        return None, (out, jnp.where(some, top + jnp.log(total), -jnp.inf), kept)

    _, tiled = jax.lax.scan(walk, None, tiles)
    out, lse, kept = (
        unfold_blocks(tiles.restore_order(x), fold.batch, fold.q_heads, facts.block_q)
        for x in tiled
    )
    if count_kept:
        visible_BT = count_visible(
            q.shape[1], k.shape[1], causal=facts.causal, segment_ids=segment_ids
        )
        out, lse = add_zero_logits(out, lse, visible_BT[..., None] - kept)
    return out.astype(q.dtype), lse


def _backward(residuals, d_out, d_lse, facts):
    """Return dq, dk, dv; each tile owns key blocks and adds to the dq of the rows it visits."""
    q, k, v, schedule, kv_mask, segment_ids, out, lse = residuals
    fold = make_fold(q, k, schedule)
    grid = schedule.kv_indices.shape[-2:]
    operands = _fold_operands(q, k, v, kv_mask, segment_ids, fold, facts)
    tiles = make_key_tiles(schedule, fold, block_q=facts.block_q)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse
    # A row that counted nothing has no probabilities, exp(s - inf) = 0, and takes no gradient,
    # whatever came back along its lse of -inf.
    counted = lse > -jnp.inf
    lse, delta = jnp.where(counted, lse, jnp.inf), jnp.where(counted, delta, 0.0)
    d_out_XYQH, lse_XYQ, delta_XYQ = (
        fold_blocks(x, fold.batch, fold.q_heads, facts.block_q) for x in (d_out, lse, delta)
    )
    num_lists, num_kv = fold.q_heads[1], grid[1]
    group = num_lists // fold.kv_heads[1]

    def walk(dq_XYHQ, tile):
        unit, column = tile.owner // num_kv, tile.owner % num_kv
        own_R1 = ((unit // group) * num_kv + column)[:, None]
        k_XRCH = gather_blocks(operands.k_XYCH, own_R1)
        v_XRCH = gather_blocks(operands.v_XYCH, own_R1)
        k_XRHC = k_XRCH.swapaxes(-1, -2)

        def step(index, state):
            dq_XYHQ, dk, dv = state
            rows = operands.q_XYQH.shape[2]
            visited_RW, listed = tile.walk(index, rows)
            q_XRQH, d_out_XRQH = (
                gather_blocks(x, visited_RW) for x in (operands.q_XYQH, d_out_XYQH)
            )
            lse_XRQ, delta_XRQ = (gather_blocks(x, visited_RW) for x in (lse_XYQ, delta_XYQ))
            reach = _reach(operands, visited_RW, own_R1, grid, facts)
            attended = _attended(operands, reach, own_R1, listed[:, :, None])
            # Everything lies keys by queries: each product then contracts the last axis of its
            # left operand, the form that CPU libraries run at full speed.
            s = _matmul("xrch,xrqh->xrcq", k_XRCH, q_XRQH) * facts.scale
            s = jnp.where(attended.swapaxes(-1, -2), s, -jnp.inf)
            p = jnp.exp(s - lse_XRQ[..., None, :])
            dp = _matmul("xrch,xrqh->xrcq", v_XRCH, d_out_XRQH)
            ds = (p * (dp - delta_XRQ[..., None, :])).astype(q.dtype)
            dv = dv + _matmul("xrcq,xrqh->xrch", p.astype(q.dtype), d_out_XRQH)
            dk = dk + _matmul("xrcq,xrqh->xrch", ds, q_XRQH)
            dq_XRHQ = _matmul("xrhc,xrcq->xrhq", k_XRHC, ds)
            # One block at a time: lists of a tile may meet in a row, and a fixed order of
            # additions is what makes two runs agree to the last bit.
            for r, w in [(r, w) for r in range(visited_RW.shape[0]) for w in range(tile.width)]:
                block = dq_XRHQ[:, r, :, w * rows : (w + 1) * rows]
                dq_XYHQ = dq_XYHQ.at[:, visited_RW[r, w]].add(block)
            return dq_XYHQ, dk, dv

        zeros = jnp.zeros(k_XRCH.shape, jnp.float32)
        dq_XYHQ, dk, dv = jax.lax.fori_loop(0, tile.num_steps, step, (dq_XYHQ, zeros, zeros))
        return dq_XYHQ, (dk, dv)

    dq_start = jnp.zeros(operands.q_XYQH.swapaxes(-1, -2).shape, jnp.float32)
    dq_XYHQ, tiled = jax.lax.scan(walk, dq_start, tiles)
    dq = unfold_blocks(dq_XYHQ.swapaxes(-1, -2), fold.batch, fold.q_heads, facts.block_q)
    # Lists of several query heads read the same key head: their shares are summed.
    list_heads = (fold.kv_heads[0], num_lists, 1)
    dk, dv = (
        unfold_blocks(tiles.restore_order(x), fold.batch, list_heads, facts.block_kv)
        .reshape(*k.shape[:3], group, k.shape[3])
        .sum(axis=3)
        for x in tiled
    )
    scale = facts.scale
    return (dq * scale).astype(q.dtype), (dk * scale).astype(k.dtype), dv.astype(v.dtype)


def run(arrays: AttentionArrays, facts: AttentionFacts) -> tuple[jax.Array, jax.Array]:
    """Run block-sparse attention over the lists of a schedule.

    Returns:
      tuple of out, shaped and typed like q, and lse f32[B, T, N]; both differentiable.

    Numerics:
      Products accumulate in f32; softmax is f32; probabilities are rounded to the dtype of the
      inputs before they meet the values.

    References:
      FlashAttention-2, arXiv:2307.08691, for the online softmax and the backward pass.
    """
    schedule = make_schedule(arrays, facts)
    return _attention(*arrays._replace(blocks=schedule), facts)


_attention = jax.custom_vjp(_forward, nondiff_argnames=("facts",))


def _attention_fwd(q, k, v, schedule, kv_mask, segment_ids, facts):
    out, lse = _attention(q, k, v, schedule, kv_mask, segment_ids, facts)
    return (out, lse), (q, k, v, schedule, kv_mask, segment_ids, out, lse)


def _attention_bwd(facts, residuals, cotangents):
    d_out, d_lse = cotangents
    return (*_backward(residuals, d_out, d_lse, facts), None, None, None)


_attention.defvjp(_attention_fwd, _attention_bwd)
