"""Block-sparse attention forward on Hopper tensor cores.

One list of key blocks for each block of queries. The softmax is online and in base 2; see
`program` for what lies where.

Letters: B T S N K H I J as everywhere (`sparsejax.types`).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention.mosaic_sm90.program import Share, launch, write
from pallas_kernels.block_sparse_attention.mosaic_sm90.tile_lists import TileLists
from pallas_kernels.block_sparse_attention.mosaic_sm90.tiles import (
    LOG2_E,
    load_vector,
    make_mask,
    multiply,
    multiply_add,
    zeros,
)
from pallas_kernels.block_sparse_attention.mosaic_sm90.walk import Problem, Walk, make_walk
from pallas_kernels.hopper.budget import NUM_COMPUTE, ROWS
from pallas_kernels.hopper.layouts import BY_COLUMN, BY_ROW

# A finite start keeps a row that never sees a key clear of inf - inf.
_LOWEST = -1e30


def make_forward_walk(problem: Problem) -> Walk:
    """Choose the tiles of the forward kernel.

    Raises:
      NotImplementedError: if the head dim is too large.
    """
    head_bytes = 2 * problem.head_dim
    return make_walk(
        problem,
        over_queries=True,
        resident_bytes=head_bytes + 4 * 3,
        streamed_bytes=2 * head_bytes + 4 * (problem.has_kv_mask + problem.has_segments),
        # Logits and output of 64 rows share the registers of a warpgroup.
        max_tile=128 if problem.head_dim <= 128 else 64,
    )


def attention_forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lists: TileLists,
    kv_mask: jax.Array | None,
    segment_ids: jax.Array | None,
    num_visible: jax.Array | None,
    problem: Problem,
) -> tuple[jax.Array, jax.Array]:
    """Launch the forward kernel.

    Args:
      q: bf16 or f16[B, T, N, H].
      k: [B, S, K, H]; finite everywhere, as are the values.
      v: [B, S, K, H].
      lists: TileLists of the query blocks.
      kv_mask: int32[B, S] or None, 0 removes a key.
      segment_ids: int32[B, T] or None.
      num_visible: f32[B, T], keys that each query sees; given if `problem.zero_logits`.

    Returns:
      tuple of out, shaped and typed like q, and lse f32[B, N, T], -inf where nothing counted.
    """
    lse_shape = (problem.batch, problem.num_heads, problem.num_queries)
    return launch(
        _compute,
        {
            "q": q,
            "k": k,
            "v": v,
            "kv_mask": kv_mask,
            "segments": segment_ids,
            "visible": num_visible,
        },
        lists,
        problem=problem,
        walk=make_forward_walk(problem),
        resident=("q", "segments", "visible"),
        streamed=(("k", "kv_mask", "segments"), ("v",)),
        scratch={"lse": plgpu.SMEM((NUM_COMPUTE, ROWS), jnp.float32)},
        out_type=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(lse_shape, jnp.float32),
        ],
        name="block_sparse_attention_forward",
    )


class _State(NamedTuple):
    """The online softmax of 64 queries.

    Attributes:
      top: f32[64], the greatest logit so far, in base 2.
      total: f32[64], sum of exponentials, relative to `top`.
      acc: f32[64, H], sum of values, likewise.
      kept: f32[64], visible keys so far; only counted if `problem.zero_logits`.
    """

    top: Any
    total: Any
    acc: Any
    kept: Any


def _compute(share: Share, out_gmem: Any, lse_gmem: Any) -> None:
    """Attend from a warpgroup's queries to the keys on their list."""
    query_segments = load_vector(share.smem, "segments", BY_ROW)
    state = _State(
        top=zeros((ROWS,), BY_ROW, _LOWEST),
        total=zeros((ROWS,), BY_ROW),
        acc=zeros((ROWS, share.problem.head_dim)),
        kept=zeros((ROWS,), BY_ROW),
    )
    top, total, acc, kept = share.walk_list(
        functools.partial(_attend_tile, share, query_segments), state
    )
    if share.problem.zero_logits:
        top, total, acc = _add_zero_logits(share, top, total, acc, kept)
    some = total > 0
    inverse = jnp.where(some, 1 / total, 0.0)
    out = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
    lse = jnp.where(some, top / LOG2_E + jnp.log(total), -jnp.inf)
    # The queries are not read again: the output takes their place.
    write(share, [(out, share.smem["q"], out_gmem), (lse, share.smem["lse"], lse_gmem)])


def _attend_tile(
    share: Share, query_segments: jax.Array | None, index: Any, state: _State, *, masked: bool
) -> _State:
    """Attend to the keys of one tile."""
    problem, (keys, values) = share.problem, share.rings
    top, total, acc, kept = state
    scale = problem.scale * LOG2_E
    slot = keys.find_slot(index)
    key_start, bits = share.locate(index) if masked else (None, None)
    tile = keys.wait(slot)
    s = multiply(share.smem["q"], tile["k"].transpose((1, 0)))
    seen = None
    if masked:
        seen, attended = make_mask(
            problem,
            s.shape,
            query_axis=0,
            query_start=share.start,
            key_start=key_start,
            bits=bits,
            kv_mask=load_vector(tile, "kv_mask", BY_COLUMN),
            query_segments=query_segments,
            key_segments=load_vector(tile, "segments", BY_COLUMN),
        )
        s = jnp.where(attended, s, -jnp.inf)
    keys.give_back(slot)
    if problem.zero_logits:
        kept += share.walk.tile if seen is None else seen.astype(jnp.float32).sum(axis=1)
    # The maximum is taken before scaling: one multiply-add per logit is left.
    new_top = jnp.maximum(top, s.max(axis=1) * scale)
    shrink = jnp.exp2(top - new_top)
    p = jnp.exp2(s * scale - lax.broadcast_in_dim(new_top, s.shape, [0]))
    total = total * shrink + p.sum(axis=1)
    acc *= lax.broadcast_in_dim(shrink, acc.shape, [0])
    v_smem = values.wait(slot)["v"]
    (acc,) = multiply_add([(acc, p.astype(v_smem.dtype), v_smem)], share.smem.get("staging"))
    values.give_back(slot)
    return _State(new_top, total, acc, kept)


def _add_zero_logits(
    share: Share, top: jax.Array, total: jax.Array, acc: jax.Array, kept: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Count the visible keys that are not on the list with logits of 0, and values of 0."""
    num_zeros = load_vector(share.smem, "visible", BY_ROW) - kept
    raised = jnp.where(num_zeros > 0, jnp.maximum(top, 0.0), top)
    shrink = jnp.exp2(top - raised)
    added = jnp.where(num_zeros > 0, num_zeros * jnp.exp2(-raised), 0.0)
    total = total * shrink + added
    acc *= lax.broadcast_in_dim(shrink, acc.shape, [0])
    return raised, total, acc
