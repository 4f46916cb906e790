"""Block-sparse attention forward on Hopper tensor cores.

One list of key blocks for each block of queries. The softmax is online and in base 2; see
`program` for who does what.

Letters: B T S N K H I J as everywhere (`sparsejax.types`).
"""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention.mosaic_sm90.program import launch, write
from pallas_kernels.block_sparse_attention.mosaic_sm90.tile_lists import TileLists
from pallas_kernels.block_sparse_attention.mosaic_sm90.tiles import (
    LOG2_E,
    load_vector,
    make_mask,
    multiply,
    multiply_add,
    zeros,
)
from pallas_kernels.block_sparse_attention.mosaic_sm90.walk import (
    Problem,
    Walk,
    locate,
    make_walk,
    walk_list,
)
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
    walk = make_forward_walk(problem)
    head_scale = problem.scale * LOG2_E

    def compute(share, rings, lists, out_gmem, lse_gmem):
        keys, values = rings
        q_smem, staging = share.smem["q"], share.smem.get("staging")
        query_segments = load_vector(share.smem, "segments", BY_ROW)

        def step(index, state, *, masked):
            top, total, acc, kept = state
            slot = keys.find_slot(index)
            if masked:
                _, key_start, bits = locate(problem, walk, lists, share.item, index)
            tile = keys.wait(slot)
            s = multiply(q_smem, tile["k"].transpose((1, 0)))
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
                kept += walk.tile if seen is None else seen.astype(jnp.float32).sum(axis=1)
            # The maximum is taken before scaling: one multiply-add per logit is left.
            new_top = jnp.maximum(top, s.max(axis=1) * head_scale)
            shrink = jnp.exp2(top - new_top)
            p = jnp.exp2(s * head_scale - lax.broadcast_in_dim(new_top, s.shape, [0]))
            total = total * shrink + p.sum(axis=1)
            acc *= lax.broadcast_in_dim(shrink, acc.shape, [0])
            v_smem = values.wait(slot)["v"]
            (acc,) = multiply_add([(acc, p.astype(v_smem.dtype), v_smem)], staging)
            values.give_back(slot)
            return new_top, total, acc, kept

        state = (
            zeros((ROWS,), BY_ROW, _LOWEST),
            zeros((ROWS,), BY_ROW),
            zeros((ROWS, problem.head_dim)),
            zeros((ROWS,), BY_ROW),
        )
        top, total, acc, kept = walk_list(problem, walk, share.item, step, state)
        if problem.zero_logits:
            num_zeros = load_vector(share.smem, "visible", BY_ROW) - kept
            raised = jnp.where(num_zeros > 0, jnp.maximum(top, 0.0), top)
            shrink = jnp.exp2(top - raised)
            added = jnp.where(num_zeros > 0, num_zeros * jnp.exp2(-raised), 0.0)
            top, total = raised, total * shrink + added
            acc *= lax.broadcast_in_dim(shrink, acc.shape, [0])
        some = total > 0
        inverse = jnp.where(some, 1 / total, 0.0)
        out = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
        lse = jnp.where(some, top / LOG2_E + jnp.log(total), -jnp.inf)
        # The queries are not read again: the output takes their place.
        write(share, [(out, q_smem, out_gmem), (lse, share.smem["lse"], lse_gmem)])

    lse_shape = (problem.batch, problem.num_heads, problem.num_queries)
    return launch(
        compute,
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
        walk=walk,
        resident=("q", "segments", "visible"),
        streamed=(("k", "kv_mask", "segments"), ("v",)),
        scratch={"lse": plgpu.SMEM((NUM_COMPUTE, ROWS), jnp.float32)},
        out_type=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(lse_shape, jnp.float32),
        ],
        name="block_sparse_attention_forward",
    )
