"""The gradients: logits are computed again from the saved log-sum-exp.

One walk over the lists of key blocks gives dK and dV. In the form for a CPU it adds each block's
share to the dQ of the rows that it visits. In the form for a GPU such additions of lists that run
at the same time would meet in one row, so dQ has a walk of its own over the lists of query
blocks; the logits are computed twice, and the order of every sum is fixed.

Letters: as in `operands`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_lists import Tile, gather_blocks, walk_lists, walk_tiles
from pallas_kernels.block_sparse_attention.block_schedule import BlockSchedule
from pallas_kernels.block_sparse_attention.call import AttentionArrays, AttentionFacts
from pallas_kernels.block_sparse_attention.xla.folding import fold_blocks, unfold_blocks
from pallas_kernels.block_sparse_attention.xla.operands import Operands, fold_operands, matmul
from pallas_kernels.block_sparse_attention.xla.tiles import make_key_tiles, make_query_tiles
from pallas_kernels.meshes import vary_like


class _Rows(NamedTuple):
    """What the gradient needs of each query besides q, folded.

    A row that counted nothing has lse inf: it has no probabilities and takes no gradient.
    """

    d_out_XYQH: jax.Array
    lse_XYQ: jax.Array
    delta_XYQ: jax.Array


def differentiate(
    arrays: AttentionArrays,
    schedule: BlockSchedule,
    results: tuple[jax.Array, jax.Array],
    cotangents: tuple[jax.Array, jax.Array],
    facts: AttentionFacts,
    *,
    parallel: bool,
    kept_YJqc: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of q, k and v.

    Args:
      schedule: BlockSchedule that `attend` was given.
      results: what it returned, out float[B, T, N, H] and lse f32[B, T, N].
      cotangents: theirs.
      parallel: bool, the form for a GPU.
      kept_YJqc: see `Operands`.

    Returns:
      tuple of dq, dk and dv, shaped and typed like q, k and v.
    """
    operands = fold_operands(arrays, schedule, facts, kept_YJqc)
    rows = _make_rows(operands, results, cotangents)
    fold = operands.fold
    key_tiles = make_key_tiles(schedule, fold, facts, parallel=parallel)
    dq_start = None
    if not parallel:
        dq_start = jnp.zeros(operands.q_XYQH.swapaxes(-1, -2).shape, jnp.float32)
        dq_start = vary_like(dq_start, operands.q_XYQH)
    dq_XYHQ, key_gradients = _walk_key_lists(operands, rows, key_tiles, dq_start)
    if dq_XYHQ is not None:
        dq_XYQH = dq_XYHQ.swapaxes(-1, -2)
    else:
        query_tiles = make_query_tiles(schedule, fold, facts, parallel=parallel)
        dq_XYQH = _walk_query_lists(operands, rows, query_tiles)
    dq = unfold_blocks(dq_XYQH, fold.batch, fold.q_heads, facts.block_q)
    # Lists of several query heads read the same key head: their shares are summed.
    num_lists = fold.q_heads[1]
    list_heads = (fold.kv_heads[0], num_lists, 1)
    dk, dv = (
        unfold_blocks(x, fold.batch, list_heads, facts.block_kv)
        .reshape(*arrays.k.shape[:3], num_lists // fold.kv_heads[1], facts.head_dim)
        .sum(axis=3)
        for x in key_gradients
    )
    dtype, scale = arrays.q.dtype, facts.scale
    return (dq * scale).astype(dtype), (dk * scale).astype(dtype), dv.astype(dtype)


def _make_rows(
    operands: Operands,
    results: tuple[jax.Array, jax.Array],
    cotangents: tuple[jax.Array, jax.Array],
) -> _Rows:
    (out, lse), (d_out, d_lse) = results, cotangents
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse
    # A row that counted nothing has no probabilities, exp(s - inf) = 0, and takes no gradient,
    # whatever came back along its lse of -inf.
    counted = lse > -jnp.inf
    lse, delta = jnp.where(counted, lse, jnp.inf), jnp.where(counted, delta, 0.0)
    fold, block_q = operands.fold, operands.facts.block_q
    return _Rows(*(fold_blocks(x, fold.batch, fold.q_heads, block_q) for x in (d_out, lse, delta)))


def _differentiate_softmax(s, dp, lse, delta):
    """Return the probabilities and the gradient of the logits, both f32 and shaped like `s`."""
    p = jnp.exp(s - lse)
    return p, p * (dp - delta)


def _walk_key_lists(
    operands: Operands, rows: _Rows, tiles: Tile | tuple[Tile, ...], dq_XYHQ: jax.Array | None
) -> tuple[jax.Array | None, tuple[jax.Array, ...]]:
    """Walk the query blocks of each key block.

    Args:
      tiles: of `make_key_tiles`.
      dq_XYHQ: f32[X, Y, H, Q], what shares of dq / scale are added to; None: nothing.

    Returns:
      tuple of dq_XYHQ and (dk / scale, dv), each f32[X, U, C, H] with a list for each mask and
      key block.
    """
    facts, num_kv = operands.facts, operands.grid[1]
    group = operands.fold.q_heads[1] // operands.fold.kv_heads[1]

    def advance(dq_XYHQ: Any, sums: tuple[jax.Array, jax.Array], tile: Tile):
        unit, column = tile.owner // num_kv, tile.owner % num_kv
        own_R1 = ((unit // group) * num_kv + column)[:, None]
        k_XRCH = gather_blocks(operands.k_XYCH, own_R1)
        v_XRCH = gather_blocks(operands.v_XYCH, own_R1)
        k_XRHC = k_XRCH.swapaxes(-1, -2)

        def step(index, state):
            dq_XYHQ, dk, dv = state
            visited_RW, listed = tile.walk(index, operands.q_XYQH.shape[2])
            q_XRQH, d_out_XRQH = (
                gather_blocks(x, visited_RW) for x in (operands.q_XYQH, rows.d_out_XYQH)
            )
            lse_XRQ, delta_XRQ = (
                gather_blocks(x, visited_RW) for x in (rows.lse_XYQ, rows.delta_XYQ)
            )
            reach = operands.find_reach(visited_RW, own_R1)
            kept = operands.find_kept(visited_RW, own_R1, listed[:, :, None])
            attended = operands.find_attended(reach, own_R1, kept)
            # Everything lies keys by queries: each product then contracts the last axis of its
            # left operand, the form that CPU libraries run at full speed.
            s = matmul("xrch,xrqh->xrcq", k_XRCH, q_XRQH) * facts.scale
            s = jnp.where(attended.swapaxes(-1, -2), s, -jnp.inf)
            dp = matmul("xrch,xrqh->xrcq", v_XRCH, d_out_XRQH)
            p, ds = _differentiate_softmax(s, dp, lse_XRQ[..., None, :], delta_XRQ[..., None, :])
            ds = ds.astype(q_XRQH.dtype)
            dv = dv + matmul("xrcq,xrqh->xrch", p.astype(q_XRQH.dtype), d_out_XRQH)
            dk = dk + matmul("xrcq,xrqh->xrch", ds, q_XRQH)
            if dq_XYHQ is not None:
                dq_XRHQ = matmul("xrhc,xrcq->xrhq", k_XRHC, ds)
                dq_XYHQ = _add_blocks(dq_XYHQ, dq_XRHQ, visited_RW)
            return dq_XYHQ, dk, dv

        dq_XYHQ, dk, dv = jax.lax.fori_loop(0, tile.num_steps, step, (dq_XYHQ, *sums))
        return dq_XYHQ, (dk, dv)

    def walk(dq_XYHQ: Any, tile: Tile):
        k_XYCH = operands.k_XYCH
        shape = k_XYCH.shape[0], tile.owner.shape[0], *k_XYCH.shape[2:]
        zeros = vary_like(jnp.zeros(shape, jnp.float32), k_XYCH)
        return walk_lists(advance, dq_XYHQ, (zeros, zeros), tile)

    return walk_tiles(walk, dq_XYHQ, tiles)


def _add_blocks(total_XYHQ, x_XRHQ, blocks_RW):
    """Add R lists of W blocks, side by side along the last axis, to the blocks of Y they name.

    One block at a time: lists of a tile may meet in a row, and a fixed order of additions is what
    makes two runs agree to the last bit.
    """
    (lists, width), rows = blocks_RW.shape, total_XYHQ.shape[-1]
    for r, w in [(r, w) for r in range(lists) for w in range(width)]:
        block = x_XRHQ[:, r, :, w * rows : (w + 1) * rows]
        total_XYHQ = total_XYHQ.at[:, blocks_RW[r, w]].add(block)
    return total_XYHQ


def _walk_query_lists(operands: Operands, rows: _Rows, tiles: Tile | tuple[Tile, ...]) -> jax.Array:
    """Walk the key blocks of each query block.

    Args:
      tiles: of `make_query_tiles`.

    Returns:
      f32[X, Y, Q, H], dq / scale.
    """

    def walk(_, tile: Tile):
        q_XRQH, d_out_XRQH, lse_XRQ, delta_XRQ = (
            x[:, tile.owner] for x in (operands.q_XYQH, *rows)
        )

        def step(index, dq):
            visit = operands.visit_keys(tile, q_XRQH, index)
            dp = matmul("xrqh,xrch->xrqc", d_out_XRQH, visit.v_XRCH)
            _, ds = _differentiate_softmax(
                visit.s_XRQC, dp, lse_XRQ[..., None], delta_XRQ[..., None]
            )
            return dq + matmul("xrqc,xrch->xrqh", ds.astype(q_XRQH.dtype), visit.k_XRCH)

        start = vary_like(jnp.zeros(q_XRQH.shape, jnp.float32), q_XRQH)
        return None, (jax.lax.fori_loop(0, tile.num_steps, step, start),)

    _, (dq_XYQH,) = walk_tiles(walk, None, tiles)
    return dq_XYQH
