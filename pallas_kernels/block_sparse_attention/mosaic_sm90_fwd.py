"""Block-sparse attention forward on Hopper tensor cores.

One list of key blocks for each block of queries. The softmax is online and in base 2; see
`mosaic_sm90_tiles` for who does what.

Letters: B T S N K H I J as everywhere (`sparsejax.types`).
"""

import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention.mosaic_sm90_tiles import (
    BY_COLUMN,
    BY_ROW,
    COMPUTE_REGISTERS,
    COPY_REGISTERS,
    NUM_COMPUTE,
    ROWS,
    Group,
    Problem,
    Walk,
    copy_tiles,
    find_item,
    launch,
    make_mask,
    make_walk,
    matrix_smem,
    multiply,
    multiply_add,
    read_entry,
    zeros,
)
from pallas_kernels.block_sparse_attention.tile_lists import TileLists

LOG2_E = math.log2(math.e)
# A finite start keeps a row that never sees a key clear of inf - inf.
_LOWEST = -1e30


def make_forward_walk(problem: Problem) -> Walk:
    """Choose the tiles of the forward kernel.

    Args:
      problem: Problem.

    Returns:
      Walk.

    Raises:
      NotImplementedError: if the head dim is too large.
    """
    head_bytes = 2 * problem.head_dim
    staging_bytes = 0 if problem.in_registers else 2 * 128
    return make_walk(
        problem,
        over_queries=True,
        resident_bytes=head_bytes + staging_bytes + 4 * 3,
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
      num_visible: f32[1 or B, T], keys that each query sees; given if `problem.zero_logits`.
      problem: Problem.

    Returns:
      tuple of out, shaped and typed like q, and lse f32[B, N, T], -inf where nothing counted.
    """
    walk = make_forward_walk(problem)
    dtype, head_dim = jnp.dtype(problem.dtype), problem.head_dim
    head_scale = problem.scale * LOG2_E

    def body(gmem, outputs, smem):
        warpgroup = lax.axis_index("warpgroup")
        out_gmem, lse_gmem = outputs
        group = problem.group

        def find(ring):
            return find_item(problem, walk, gmem["lists"], ring)

        def key_tile(name):
            return lambda item, head, start: gmem[name].at[
                item.batch, pl.ds(pl.multiple_of(start, walk.tile), walk.tile), head
            ]

        def key_vector(name):
            return lambda item, head, start: gmem[name].at[
                item.batch, pl.ds(pl.multiple_of(start, walk.tile), walk.tile)
            ]

        vectors = [name for name in ("kv_mask", "segments") if gmem[name] is not None]
        keys = Group(
            gmem=(key_tile("k"), *map(key_vector, vectors)),
            smem=(smem["k"], *(smem["streamed_" + name] for name in vectors)),
            full=smem["k_full"],
            free=smem["k_free"],
        )
        values = Group(
            gmem=(key_tile("v"),), smem=(smem["v"],), full=smem["v_full"], free=smem["v_free"]
        )

        @pl.when(warpgroup == NUM_COMPUTE)
        def _copy():
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
            items = [find(ring) for ring in range(walk.rings)]

            def locate(item, step):
                index, _ = read_entry(gmem["lists"], item, lax.div(step, walk.pieces))
                start = (index * walk.pieces + lax.rem(step, walk.pieces)) * walk.tile
                return lax.div(item.head, group), start, index

            steps = [item.count * walk.pieces for item in items]
            copy_tiles(walk, items, (keys, values), steps, locate)

        @pl.when(warpgroup < NUM_COMPUTE)
        def _compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            ring = warpgroup if walk.rings == NUM_COMPUTE else 0
            item = find(ring)
            start = item.block * walk.block + (0 if walk.rings == NUM_COMPUTE else warpgroup * ROWS)
            rows = pl.ds(pl.multiple_of(start, ROWS), ROWS)
            q_smem = smem["q"].at[warpgroup]
            staging = None if problem.in_registers else smem["staging"].at[warpgroup]
            ready = smem["resident_full"].at[warpgroup]
            plgpu.copy_gmem_to_smem(gmem["q"].at[item.batch, rows, item.head], q_smem, ready)
            segments = visible = None
            if problem.has_segments:
                segments_smem = smem["segments"].at[warpgroup]
                plgpu.copy_gmem_to_smem(gmem["segments"].at[item.batch, rows], segments_smem, ready)
            if problem.zero_logits:
                visible_smem = smem["visible"].at[warpgroup]
                entry = item.batch if gmem["visible"].shape[0] > 1 else 0
                plgpu.copy_gmem_to_smem(gmem["visible"].at[entry, rows], visible_smem, ready)
            plgpu.barrier_wait(ready)
            if problem.has_segments:
                segments = plgpu.load(segments_smem, layout=BY_ROW)

            def step(index, state, *, masked):
                top, total, acc, kept = state
                slot = ring * walk.stages + lax.rem(index, jnp.int32(walk.stages))
                k_smem, *vector_smem = keys.at(slot)
                if masked:
                    block, bits = read_entry(gmem["lists"], item, lax.div(index, walk.pieces))
                plgpu.barrier_wait(keys.full.at[slot])
                s = multiply(q_smem, k_smem.transpose((1, 0)))
                seen = None
                if masked:
                    loaded = {
                        name: plgpu.load(ref, layout=BY_COLUMN)
                        for name, ref in zip(vectors, vector_smem, strict=True)
                    }
                    seen, attended = make_mask(
                        problem,
                        s.shape,
                        query_axis=0,
                        query_start=start,
                        key_start=(block * walk.pieces + lax.rem(index, walk.pieces)) * walk.tile,
                        bits=bits,
                        kv_mask=loaded.get("kv_mask"),
                        query_segments=segments,
                        key_segments=loaded.get("segments"),
                    )
                    s = jnp.where(attended, s, -jnp.inf)
                plgpu.barrier_arrive(keys.free.at[slot])
                if problem.zero_logits:
                    kept += walk.tile if seen is None else seen.astype(jnp.float32).sum(axis=1)
                # The maximum is taken before scaling: one multiply-add per logit is left.
                new_top = jnp.maximum(top, s.max(axis=1) * head_scale)
                shrink = jnp.exp2(top - new_top)
                p = jnp.exp2(s * head_scale - lax.broadcast_in_dim(new_top, s.shape, [0]))
                total = total * shrink + p.sum(axis=1)
                acc *= lax.broadcast_in_dim(shrink, acc.shape, [0])
                plgpu.barrier_wait(values.full.at[slot])
                (acc,) = multiply_add([(acc, p.astype(dtype), smem["v"].at[slot])], staging)
                plgpu.barrier_arrive(values.free.at[slot])
                return new_top, total, acc, kept

            state = (
                zeros((ROWS,), BY_ROW, _LOWEST),
                zeros((ROWS,), BY_ROW),
                zeros((ROWS, head_dim)),
                zeros((ROWS,), BY_ROW),
            )
            num_clear = item.num_leading * walk.pieces
            num_steps = item.count * walk.pieces
            if not problem.all_masked:
                state = lax.fori_loop(0, num_clear, lambda *x: step(*x, masked=False), state)
            if problem.all_masked or problem.causal:
                state = lax.fori_loop(num_clear, num_steps, lambda *x: step(*x, masked=True), state)
            top, total, acc, kept = state
            if problem.zero_logits:
                visible = plgpu.load(visible_smem, layout=BY_ROW)
                num_zeros = visible - kept
                raised = jnp.where(num_zeros > 0, jnp.maximum(top, 0.0), top)
                shrink = jnp.exp2(top - raised)
                share = jnp.where(num_zeros > 0, num_zeros * jnp.exp2(-raised), 0.0)
                top, total = raised, total * shrink + share
                acc *= lax.broadcast_in_dim(shrink, acc.shape, [0])
            some = total > 0
            inverse = jnp.where(some, 1 / total, 0.0)
            q_smem[...] = (acc * lax.broadcast_in_dim(inverse, acc.shape, [0])).astype(dtype)
            lse_smem = smem["lse"].at[warpgroup]
            lse_smem[...] = jnp.where(some, top / LOG2_E + jnp.log(total), -jnp.inf)
            plgpu.commit_smem()

            @pl.when(item.valid)
            def _():
                plgpu.copy_smem_to_gmem(q_smem, out_gmem.at[item.batch, rows, item.head])
                plgpu.copy_smem_to_gmem(lse_smem, lse_gmem.at[item.batch, item.head, rows])

            plgpu.wait_smem_to_gmem(0)

    slots, tile = walk.slots, walk.tile
    consumers = NUM_COMPUTE // walk.rings
    num_vectors = problem.has_kv_mask + problem.has_segments

    def row_smem(wanted, kind):
        return plgpu.SMEM((NUM_COMPUTE, ROWS), kind) if wanted else None

    def streamed_smem(wanted):
        return plgpu.SMEM((slots, tile), jnp.int32) if wanted else None

    return launch(
        body,
        {
            "q": q,
            "k": k,
            "v": v,
            "lists": lists,
            "kv_mask": kv_mask,
            "segments": segment_ids,
            "visible": num_visible,
        },
        problem=problem,
        walk=walk,
        out_type=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(
                (problem.batch, problem.num_heads, problem.num_queries), "float32"
            ),
        ],
        scratch={
            "q": matrix_smem((NUM_COMPUTE, ROWS, head_dim), dtype),
            "k": matrix_smem((slots, tile, head_dim), dtype),
            "v": matrix_smem((slots, tile, head_dim), dtype),
            "staging": None
            if problem.in_registers
            else matrix_smem((NUM_COMPUTE, ROWS, tile), dtype),
            "lse": row_smem(True, jnp.float32),
            "segments": row_smem(problem.has_segments, jnp.int32),
            "visible": row_smem(problem.zero_logits, jnp.float32),
            "streamed_kv_mask": streamed_smem(problem.has_kv_mask),
            "streamed_segments": streamed_smem(problem.has_segments),
            "resident_full": plgpu.Barrier(
                num_arrivals=1 + problem.has_segments + problem.zero_logits,
                num_barriers=NUM_COMPUTE,
            ),
            "k_full": plgpu.Barrier(num_arrivals=1 + num_vectors, num_barriers=slots),
            "k_free": plgpu.Barrier(num_arrivals=consumers, num_barriers=slots),
            "v_full": plgpu.Barrier(num_barriers=slots),
            "v_free": plgpu.Barrier(num_arrivals=consumers, num_barriers=slots),
        },
        name="block_sparse_attention_forward",
    )
