"""Block-sparse attention backward on Hopper: two kernels, deterministic, without atomics.

With p = exp(s - lse), dp = dO V^T and ds = p (dp - delta), delta = rowsum(dO * O) - dlse:

  dQ = scale ds K        one list of key blocks for each block of queries
  dV = p^T dO            one list of query blocks for each block of keys,
  dK = scale ds^T Q      over all query heads that read the key head

Logits are computed again from the saved log-sum-exp. Key heads that serve several query heads sum
over them in f32 registers; or over a part of them, where there are too few key heads to fill the
device, and the parts, in f32, are added in a fixed order. See `program` for what lies where.

Letters: B T S N K H I J as everywhere (`sparsejax.types`).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention.mosaic_sm90.program import launch
from pallas_kernels.block_sparse_attention.mosaic_sm90.share import (
    Place,
    Share,
    mask_by_query,
    write,
    write_parts,
)
from pallas_kernels.block_sparse_attention.mosaic_sm90.tile_lists import TileLists
from pallas_kernels.block_sparse_attention.mosaic_sm90.tiles import (
    LOG2_E,
    Start,
    load_vector,
    make_mask,
    multiply,
    multiply_add,
    multiply_both,
    zeros,
)
from pallas_kernels.block_sparse_attention.mosaic_sm90.walk import Problem, Walk, make_walk
from pallas_kernels.hopper.budget import ROWS
from pallas_kernels.hopper.layouts import BY_COLUMN, BY_ROW


class Operands(NamedTuple):
    """What both backward kernels read.

    Attributes:
      q: bf16 or f16[B, T, N, H].
      k: [B, S, K, H]; finite everywhere, as are the values.
      v: [B, S, K, H].
      d_out: [B, T, N, H], cotangent of the output.
      lse: f32[B, N, T], log-sum-exp in base 2, +inf for rows that counted nothing.
      minus_delta: f32[B, N, T], -delta.
      kv_mask: int32[B, S] or None, 0 removes a key.
      segments: int32[B, T] or None.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    d_out: jax.Array
    lse: jax.Array
    minus_delta: jax.Array
    kv_mask: jax.Array | None
    segments: jax.Array | None


def make_query_walk(problem: Problem) -> Walk:
    """Choose the tiles of the kernel for dQ.

    Raises:
      NotImplementedError: if the head dim is too large.
    """
    head_bytes = 2 * problem.head_dim
    return make_walk(
        problem,
        over_queries=True,
        resident_bytes=2 * head_bytes + 4 * 3,
        streamed_bytes=2 * head_bytes + 4 * (problem.has_kv_mask + problem.has_segments),
        # Logits, their gradient and dQ share the registers of a warpgroup.
        max_tile=64,
    )


def make_key_walk(problem: Problem, *, parts: int = 1) -> Walk:
    """Choose the tiles of the kernel for dK and dV.

    Args:
      parts: int, into which the query heads of a key head are split: see `choose_parts`.

    Raises:
      NotImplementedError: if the head dim is too large.
    """
    if problem.head_dim > 128:
        raise NotImplementedError(
            f"the gradient needs head dim at most 128, got {problem.head_dim}: dK and dV of 64 "
            "keys would take all registers of a warpgroup"
        )
    pairs_blocks = problem.grain.rows * problem.grain.columns > 1
    if problem.head_dim == 128 and pairs_blocks and problem.has_segments:
        raise NotImplementedError(
            "the gradient at head dim 128 takes blocks of 64 and more where there are segments: "
            "the mask of smaller blocks beside that of segments leaves too few registers"
        )
    head_bytes = 2 * problem.head_dim
    return make_walk(
        problem,
        over_queries=False,
        resident_bytes=2 * head_bytes + 4 * 2,
        streamed_bytes=2 * head_bytes + 4 * (2 + problem.has_segments),
        max_tile=64,
        parts=parts,
    )


def attention_backward_queries(operands: Operands, lists: TileLists, problem: Problem) -> jax.Array:
    """Launch the kernel for dQ.

    Args:
      lists: TileLists of the query blocks.

    Returns:
      dq, shaped and typed like q.
    """
    (dq,) = launch(
        _compute_dq,
        operands._asdict(),
        lists,
        problem=problem,
        walk=make_query_walk(problem),
        resident=("q", "d_out", "lse", "minus_delta", "segments"),
        streamed=(("k", "kv_mask", "segments"), ("v",)),
        out_type=[jax.ShapeDtypeStruct(operands.q.shape, operands.q.dtype)],
        name="block_sparse_attention_backward_queries",
    )
    return dq


class _Rows(NamedTuple):
    """Vectors of 64 queries.

    Attributes:
      lse: f32[64].
      minus_delta: f32[64].
      segments: int32[64] or None.
    """

    lse: Any
    minus_delta: Any
    segments: Any


def _compute_dq(share: Share, dq_gmem: Any) -> None:
    """Sum dQ of a warpgroup's queries over the keys on their list."""
    rows = _Rows(
        *(load_vector(share.smem, name, BY_ROW) for name in ("lse", "minus_delta", "segments"))
    )
    step = functools.partial(_add_to_dq, share, rows)
    share.wait_ahead(share.first, *share.rings)
    dq = share.walk_list(step, zeros((ROWS, share.problem.head_dim)))
    # The queries are not read again: their gradient takes their place.
    write(share, [(dq * share.problem.scale, share.smem["q"], dq_gmem)])


def _add_to_dq(share: Share, rows: _Rows, index: Any, dq: jax.Array, *, masked: bool) -> jax.Array:
    """Add what the keys of one tile contribute to dQ."""
    keys, values = share.rings
    slot = keys.find_slot(index)
    place = share.locate(index) if masked else None
    tile, v_smem = keys.look(slot), values.look(slot)["v"]
    k_smem = tile["k"]

    def probabilities(s):
        p = _probabilities_by_query(share, rows, tile, place, s)
        share.wait_ahead(index + 1, keys, values)
        return p

    p, dp = multiply_both(
        (share.smem["q"], k_smem.transpose((1, 0))),
        (share.smem["d_out"], v_smem.transpose((1, 0))),
        _spread(share, rows.minus_delta, axis=0),
        probabilities,
    )
    values.give_back(slot)
    products = [(dq, (p * dp).astype(k_smem.dtype), k_smem)]
    (dq,) = multiply_add(products, share.smem.get("staging"))
    keys.give_back(slot)
    return dq


def _probabilities_by_query(
    share: Share,
    rows: _Rows,
    tile: dict[str, Any],
    place: Place | None,
    s: jax.Array,
) -> jax.Array:
    """Return the probabilities of a tile, queries by keys, masked if its place is given."""
    p = _exponentials(share, s, rows.lse, axis=0)
    if place is None:
        return p
    _, attended = mask_by_query(share, s.shape, place, tile, rows.segments)
    return jnp.where(attended, p, 0.0)


def _exponentials(share: Share, s: jax.Array, lse: jax.Array, *, axis: int) -> jax.Array:
    """Return exp(s - lse); queries lie on an axis of the tile."""
    scale = share.problem.scale * LOG2_E
    return jnp.exp2(s * scale - lax.broadcast_in_dim(lse, s.shape, [axis]))


def _spread(share: Share, minus_delta: jax.Array, *, axis: int) -> Start:
    """Spread -delta of queries, which lie on an axis of the tile, over a tile of logits."""
    value = lax.broadcast_in_dim(minus_delta, (ROWS, share.walk.tile), [axis])
    return Start(value, is_added_last=not share.problem.in_registers)


def attention_backward_keys(
    operands: Operands, lists: TileLists, problem: Problem, walk: Walk
) -> tuple[jax.Array, jax.Array]:
    """Launch the kernel for dK and dV.

    Args:
      lists: TileLists of the key blocks; if masks differ by head, of `walk.members` joined heads.
      walk: Walk, from `make_key_walk`.

    Returns:
      tuple of dk and dv, shaped and typed like k and v.
    """
    out_type = jax.ShapeDtypeStruct(operands.k.shape, operands.k.dtype)
    if walk.parts > 1:
        # The parts of a head lie side by side, so that a program needs to know but one number more.
        shape = (problem.batch, problem.num_keys, walk.heads, problem.head_dim)
        out_type = jax.ShapeDtypeStruct(shape, jnp.float32)
    dk, dv = launch(
        _compute_dk_dv,
        operands._asdict(),
        lists,
        problem=problem,
        walk=walk,
        resident=("k", "v", "kv_mask", "segments"),
        streamed=(("lse", "q", "segments"), ("d_out", "minus_delta")),
        out_type=[out_type] * 2,
        name="block_sparse_attention_backward_keys",
    )
    if walk.parts > 1:
        dk, dv = (_add_parts(x, walk.parts) for x in (dk, dv))
        dk, dv = ((dk * problem.scale).astype(operands.k.dtype), dv.astype(operands.v.dtype))
    return dk, dv


def _compute_dk_dv(share: Share, dk_gmem: Any, dv_gmem: Any) -> None:
    """Sum dK and dV of a warpgroup's keys over the queries on their list."""
    shape = (ROWS, share.problem.head_dim)
    share.wait_ahead(share.first, *share.rings)
    dk, dv = share.walk_list(functools.partial(_add_to_dk_dv, share), (zeros(shape), zeros(shape)))
    if share.walk.parts > 1:
        write_parts(share, [(dk, dk_gmem), (dv, dv_gmem)])
    else:
        # Keys and values are not read again: their gradients take their place.
        dk *= share.problem.scale
        write(share, [(dk, share.smem["k"], dk_gmem), (dv, share.smem["v"], dv_gmem)])


def _add_to_dk_dv(
    share: Share, index: Any, state: tuple[jax.Array, jax.Array], *, masked: bool
) -> tuple[jax.Array, jax.Array]:
    """Add what the queries of one tile contribute to dK and dV."""
    dk, dv = state
    queries, outs = share.rings
    staging = share.smem.get("staging")
    slot = queries.find_slot(index)
    place = share.locate(index) if masked else None
    tile = queries.look(slot) | outs.look(slot)
    q_smem, d_out_smem = tile["q"], tile["d_out"]
    # Everything lies keys by queries: rows are those of dK and dV.
    logits = (share.smem["k"], q_smem.transpose((1, 0)))
    d_probabilities = (share.smem["v"], d_out_smem.transpose((1, 0)))

    def probabilities(s):
        p = _probabilities_by_key(share, tile, place, s)
        share.wait_ahead(index + 1, queries, outs)
        return p

    def start():
        return _spread(share, load_vector(tile, "minus_delta", BY_COLUMN), axis=1)

    if masked and share.problem.head_dim == 128:
        # One product after the other: a mask needs the registers of the second.
        p = probabilities(multiply(*logits))
        (dv,) = multiply_add([(dv, p.astype(d_out_smem.dtype), d_out_smem)], staging)
        ds = p * multiply(*d_probabilities, start=start())
        (dk,) = multiply_add([(dk, ds.astype(q_smem.dtype), q_smem)], staging)
    else:
        p, dp = multiply_both(logits, d_probabilities, start(), probabilities)
        products = [(dv, p, d_out_smem), (dk, p * dp, q_smem)]
        dv, dk = multiply_add(
            [(acc, lhs.astype(rhs.dtype), rhs) for acc, lhs, rhs in products], staging
        )
    outs.give_back(slot)
    queries.give_back(slot)
    return dk, dv


def _probabilities_by_key(
    share: Share, tile: dict[str, Any], place: Place | None, s: jax.Array
) -> jax.Array:
    """Return the probabilities of a tile, keys by queries, masked if its place is given."""
    p = _exponentials(share, s, load_vector(tile, "lse", BY_COLUMN), axis=1)
    if place is None:
        return p
    # Vectors are loaded for each tile: registers are what this kernel is short of.
    _, attended = make_mask(
        share.problem,
        s.shape,
        query_axis=1,
        query_start=place.tile_start,
        key_start=place.rows_start,
        bits=place.bits,
        kv_mask=load_vector(share.smem, "kv_mask", BY_ROW),
        query_segments=load_vector(tile, "segments", BY_COLUMN),
        key_segments=load_vector(share.smem, "segments", BY_ROW),
    )
    return jnp.where(attended, p, 0.0)


def _add_parts(x, parts):
    """Add f32[B, S, K * parts, H] to f32[B, S, K, H], one part after the other."""
    return functools.reduce(jnp.add, (x[:, :, part::parts] for part in range(parts)))
