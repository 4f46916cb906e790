"""Block-sparse attention backward on Hopper: two kernels, deterministic, without atomics.

With p = exp(s - lse), dp = dO V^T and ds = p (dp - delta), delta = rowsum(dO * O) - dlse:

  dQ = scale ds K        one list of key blocks for each block of queries
  dV = p^T dO            one list of query blocks for each block of keys,
  dK = scale ds^T Q      over all query heads that read the key head

Logits are computed again from the saved log-sum-exp. Key heads that serve several query heads sum
over them in f32 registers. See `mosaic_sm90_tiles` for who does what.

Letters: B T S N K H I J as everywhere (`sparsejax.types`).
"""

from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention.mosaic_sm90_fwd import LOG2_E
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
    multiply_both,
    read_entry,
    zeros,
)
from pallas_kernels.block_sparse_attention.tile_lists import TileLists


class Operands(NamedTuple):
    """What both backward kernels read.

    Attributes:
      q: bf16 or f16[B, T, N, H].
      k: [B, S, K, H]; finite everywhere, as are the values.
      v: [B, S, K, H].
      d_out: [B, T, N, H], cotangent of the output.
      lse: f32[B, N, T], log-sum-exp in base 2, +inf for rows that counted nothing.
      delta: f32[B, N, T].
      kv_mask: int32[B, S] or None, 0 removes a key.
      segments: int32[B, T] or None.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    d_out: jax.Array
    lse: jax.Array
    delta: jax.Array
    kv_mask: jax.Array | None
    segments: jax.Array | None


def make_query_walk(problem: Problem) -> Walk:
    """Choose the tiles of the kernel for dQ.

    Args:
      problem: Problem.

    Returns:
      Walk.

    Raises:
      NotImplementedError: if the head dim is too large.
    """
    head_bytes = 2 * problem.head_dim
    staging_bytes = 0 if problem.in_registers else 2 * 64
    return make_walk(
        problem,
        over_queries=True,
        resident_bytes=2 * head_bytes + staging_bytes + 4 * 3,
        streamed_bytes=2 * head_bytes + 4 * (problem.has_kv_mask + problem.has_segments),
        # Logits, their gradient and dQ share the registers of a warpgroup.
        max_tile=64,
    )


def make_key_walk(problem: Problem) -> Walk:
    """Choose the tiles of the kernel for dK and dV.

    Args:
      problem: Problem.

    Returns:
      Walk.

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
    staging_bytes = 0 if problem.in_registers else 2 * 64
    return make_walk(
        problem,
        over_queries=False,
        resident_bytes=2 * head_bytes + staging_bytes + 4 * 2,
        streamed_bytes=2 * head_bytes + 4 * (2 + problem.has_segments),
        max_tile=64,
    )


def attention_backward_queries(operands: Operands, lists: TileLists, problem: Problem) -> jax.Array:
    """Launch the kernel for dQ.

    Args:
      operands: Operands.
      lists: TileLists of the query blocks.
      problem: Problem.

    Returns:
      dq, shaped and typed like q.
    """
    walk = make_query_walk(problem)
    dtype, head_dim = jnp.dtype(problem.dtype), problem.head_dim
    logit_scale = problem.scale * LOG2_E

    def body(gmem, outputs, smem):
        warpgroup = lax.axis_index("warpgroup")
        (dq_gmem,) = outputs
        given = gmem["operands"]  # Operands of references

        def find(ring):
            return find_item(problem, walk, gmem["lists"], ring)

        def key_tile(array):
            return lambda item, head, start: array.at[
                item.batch, pl.ds(pl.multiple_of(start, walk.tile), walk.tile), head
            ]

        def key_vector(array):
            return lambda item, head, start: array.at[
                item.batch, pl.ds(pl.multiple_of(start, walk.tile), walk.tile)
            ]

        vectors = [name for name in ("kv_mask", "segments") if getattr(given, name) is not None]
        keys = Group(
            gmem=(key_tile(given.k), *(key_vector(getattr(given, name)) for name in vectors)),
            smem=(smem["k"], *(smem["streamed_" + name] for name in vectors)),
            full=smem["k_full"],
            free=smem["k_free"],
        )
        values = Group(
            gmem=(key_tile(given.v),), smem=(smem["v"],), full=smem["v_full"], free=smem["v_free"]
        )

        @pl.when(warpgroup == NUM_COMPUTE)
        def _copy():
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
            items = [find(ring) for ring in range(walk.rings)]

            def locate(item, step):
                index, _ = read_entry(gmem["lists"], item, lax.div(step, walk.pieces))
                start = (index * walk.pieces + lax.rem(step, walk.pieces)) * walk.tile
                return lax.div(item.head, problem.group), start, index

            steps = [item.count * walk.pieces for item in items]
            copy_tiles(walk, items, (keys, values), steps, locate)

        @pl.when(warpgroup < NUM_COMPUTE)
        def _compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            ring = warpgroup if walk.rings == NUM_COMPUTE else 0
            item = find(ring)
            start = item.block * walk.block + (0 if walk.rings == NUM_COMPUTE else warpgroup * ROWS)
            rows = pl.ds(pl.multiple_of(start, ROWS), ROWS)
            q_smem, d_out_smem, lse_smem, delta_smem = (
                smem[name].at[warpgroup] for name in ("q", "d_out", "lse", "delta")
            )
            staging = None if problem.in_registers else smem["staging"].at[warpgroup]
            ready = smem["resident_full"].at[warpgroup]
            for array, ref in ((given.q, q_smem), (given.d_out, d_out_smem)):
                plgpu.copy_gmem_to_smem(array.at[item.batch, rows, item.head], ref, ready)
            for array, ref in ((given.lse, lse_smem), (given.delta, delta_smem)):
                plgpu.copy_gmem_to_smem(array.at[item.batch, item.head, rows], ref, ready)
            if problem.has_segments:
                segments_smem = smem["segments"].at[warpgroup]
                plgpu.copy_gmem_to_smem(given.segments.at[item.batch, rows], segments_smem, ready)
            plgpu.barrier_wait(ready)
            lse, delta = (plgpu.load(ref, layout=BY_ROW) for ref in (lse_smem, delta_smem))
            segments = plgpu.load(segments_smem, layout=BY_ROW) if problem.has_segments else None

            def step(index, dq, *, masked):
                slot = ring * walk.stages + lax.rem(index, jnp.int32(walk.stages))
                k_smem, *vector_smem = keys.at(slot)
                if masked:
                    block, bits = read_entry(gmem["lists"], item, lax.div(index, walk.pieces))

                def probabilities(s):
                    p = jnp.exp2(s * logit_scale - lax.broadcast_in_dim(lse, s.shape, [0]))
                    if not masked:
                        return p
                    loaded = {
                        name: plgpu.load(ref, layout=BY_COLUMN)
                        for name, ref in zip(vectors, vector_smem, strict=True)
                    }
                    _, attended = make_mask(
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
                    return jnp.where(attended, p, 0.0)

                plgpu.barrier_wait(keys.full.at[slot])
                plgpu.barrier_wait(values.full.at[slot])
                p, dp = multiply_both(
                    (q_smem, k_smem.transpose((1, 0))),
                    (d_out_smem, smem["v"].at[slot].transpose((1, 0))),
                    probabilities,
                )
                plgpu.barrier_arrive(values.free.at[slot])
                ds = p * (dp - lax.broadcast_in_dim(delta, p.shape, [0]))
                (dq,) = multiply_add([(dq, ds.astype(dtype), k_smem)], staging)
                plgpu.barrier_arrive(keys.free.at[slot])
                return dq

            dq = zeros((ROWS, head_dim))
            num_clear = item.num_leading * walk.pieces
            num_steps = item.count * walk.pieces
            if not problem.all_masked:
                dq = lax.fori_loop(0, num_clear, lambda *x: step(*x, masked=False), dq)
            if problem.all_masked or problem.causal:
                dq = lax.fori_loop(num_clear, num_steps, lambda *x: step(*x, masked=True), dq)
            q_smem[...] = (dq * problem.scale).astype(dtype)
            plgpu.commit_smem()

            @pl.when(item.valid)
            def _():
                plgpu.copy_smem_to_gmem(q_smem, dq_gmem.at[item.batch, rows, item.head])

            plgpu.wait_smem_to_gmem(0)

    slots, tile = walk.slots, walk.tile
    consumers = NUM_COMPUTE // walk.rings
    rows_of_each = (NUM_COMPUTE, ROWS)

    def streamed_smem(wanted):
        return plgpu.SMEM((slots, tile), jnp.int32) if wanted else None

    (dq,) = launch(
        body,
        {"operands": operands, "lists": lists},
        problem=problem,
        walk=walk,
        out_type=[jax.ShapeDtypeStruct(operands.q.shape, operands.q.dtype)],
        scratch={
            "q": matrix_smem((*rows_of_each, head_dim), dtype),
            "d_out": matrix_smem((*rows_of_each, head_dim), dtype),
            "k": matrix_smem((slots, tile, head_dim), dtype),
            "v": matrix_smem((slots, tile, head_dim), dtype),
            "staging": None if problem.in_registers else matrix_smem((*rows_of_each, tile), dtype),
            "lse": plgpu.SMEM(rows_of_each, jnp.float32),
            "delta": plgpu.SMEM(rows_of_each, jnp.float32),
            "segments": plgpu.SMEM(rows_of_each, jnp.int32) if problem.has_segments else None,
            "streamed_kv_mask": streamed_smem(problem.has_kv_mask),
            "streamed_segments": streamed_smem(problem.has_segments),
            "resident_full": plgpu.Barrier(
                num_arrivals=4 + problem.has_segments, num_barriers=NUM_COMPUTE
            ),
            "k_full": plgpu.Barrier(
                num_arrivals=1 + problem.has_kv_mask + problem.has_segments, num_barriers=slots
            ),
            "k_free": plgpu.Barrier(num_arrivals=consumers, num_barriers=slots),
            "v_full": plgpu.Barrier(num_barriers=slots),
            "v_free": plgpu.Barrier(num_arrivals=consumers, num_barriers=slots),
        },
        name="block_sparse_attention_backward_queries",
    )
    return dq


def attention_backward_keys(
    operands: Operands, lists: TileLists, problem: Problem
) -> tuple[jax.Array, jax.Array]:
    """Launch the kernel for dK and dV.

    Args:
      operands: Operands.
      lists: TileLists of the key blocks; of joined heads if masks differ by head.
      problem: Problem.

    Returns:
      tuple of dk and dv, shaped and typed like k and v.
    """
    walk = make_key_walk(problem)
    dtype, head_dim, group = jnp.dtype(problem.dtype), problem.head_dim, problem.group
    logit_scale = problem.scale * LOG2_E
    # Heads of a group that share a list walk it one after the other.
    repeats = group if problem.mask_heads == 1 else 1
    num_query_blocks = problem.num_queries // problem.grain.block_q
    # Beside a loop with a mask, ptxas finds no room for both products at the widest head.
    overlaps = head_dim < 128 or not problem.causal

    def body(gmem, outputs, smem):
        warpgroup = lax.axis_index("warpgroup")
        dk_gmem, dv_gmem = outputs
        given = gmem["operands"]  # Operands of references

        def find(ring):
            return find_item(problem, walk, gmem["lists"], ring)

        def locate(item, step):
            """Return the query head, first query and kept bits of a step."""
            position, piece = lax.div(step, walk.pieces), lax.rem(step, walk.pieces)
            member = jnp.int32(0)
            if repeats > 1:
                # All tiles with a mask, of every head, come before those without.
                masked = item.num_leading * repeats
                in_first = position < masked
                span = jnp.where(in_first, item.num_leading, item.count - item.num_leading)
                span = jnp.maximum(span, 1)
                offset = jnp.where(in_first, 0, item.num_leading)
                position = jnp.where(in_first, position, position - masked)
                member = jnp.minimum(lax.div(position, span), repeats - 1)
                position = offset + lax.rem(position, span)
            index, bits = read_entry(gmem["lists"], item, position)
            if repeats < group:
                member, index = lax.div(index, num_query_blocks), lax.rem(index, num_query_blocks)
            return item.head * group + member, (index * walk.pieces + piece) * walk.tile, bits

        def query_tile(array):
            return lambda item, head, start: array.at[
                item.batch, pl.ds(pl.multiple_of(start, walk.tile), walk.tile), head
            ]

        def row_vector(array):
            return lambda item, head, start: array.at[
                item.batch, head, pl.ds(pl.multiple_of(start, walk.tile), walk.tile)
            ]

        def position_vector(array):
            return lambda item, head, start: array.at[
                item.batch, pl.ds(pl.multiple_of(start, walk.tile), walk.tile)
            ]

        queries_gmem = [query_tile(given.q), row_vector(given.lse)]
        queries_smem = [smem["q"], smem["lse"]]
        if problem.has_segments:
            queries_gmem.append(position_vector(given.segments))
            queries_smem.append(smem["streamed_segments"])
        queries = Group(
            gmem=tuple(queries_gmem),
            smem=tuple(queries_smem),
            full=smem["q_full"],
            free=smem["q_free"],
        )
        outs = Group(
            gmem=(query_tile(given.d_out), row_vector(given.delta)),
            smem=(smem["d_out"], smem["delta"]),
            full=smem["d_out_full"],
            free=smem["d_out_free"],
        )

        @pl.when(warpgroup == NUM_COMPUTE)
        def _copy():
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
            items = [find(ring) for ring in range(walk.rings)]
            steps = [item.count * (repeats * walk.pieces) for item in items]
            copy_tiles(walk, items, (queries, outs), steps, locate)

        @pl.when(warpgroup < NUM_COMPUTE)
        def _compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            ring = warpgroup if walk.rings == NUM_COMPUTE else 0
            item = find(ring)
            start = item.block * walk.block + (0 if walk.rings == NUM_COMPUTE else warpgroup * ROWS)
            rows = pl.ds(pl.multiple_of(start, ROWS), ROWS)
            k_smem, v_smem = (smem[name].at[warpgroup] for name in ("k", "v"))
            staging = None if problem.in_registers else smem["staging"].at[warpgroup]
            ready = smem["resident_full"].at[warpgroup]
            for array, ref in ((given.k, k_smem), (given.v, v_smem)):
                plgpu.copy_gmem_to_smem(array.at[item.batch, rows, item.head], ref, ready)
            resident = [
                name for name in ("kv_mask", "segments") if getattr(given, name) is not None
            ]
            for name in resident:
                plgpu.copy_gmem_to_smem(
                    getattr(given, name).at[item.batch, rows], smem[name].at[warpgroup], ready
                )
            plgpu.barrier_wait(ready)

            def step(index, state, *, masked):
                dk, dv = state
                slot = ring * walk.stages + lax.rem(index, jnp.int32(walk.stages))
                q_smem, lse_smem, *segments_smem = queries.at(slot)
                d_out_smem, delta_smem = outs.at(slot)
                if masked:
                    _, query_start, bits = locate(item, index)

                def probabilities(s):
                    lse = plgpu.load(lse_smem, layout=BY_COLUMN)
                    p = jnp.exp2(s * logit_scale - lax.broadcast_in_dim(lse, s.shape, [1]))
                    if not masked:
                        return p
                    # Loaded for each tile: registers are what this kernel is short of.
                    by_row = {
                        name: plgpu.load(smem[name].at[warpgroup], layout=BY_ROW)
                        for name in resident
                    }
                    query_segments = None
                    if problem.has_segments:
                        query_segments = plgpu.load(segments_smem[0], layout=BY_COLUMN)
                    _, attended = make_mask(
                        problem,
                        s.shape,
                        query_axis=1,
                        query_start=query_start,
                        key_start=start,
                        bits=bits,
                        kv_mask=by_row.get("kv_mask"),
                        query_segments=query_segments,
                        key_segments=by_row.get("segments"),
                    )
                    return jnp.where(attended, p, 0.0)

                plgpu.barrier_wait(queries.full.at[slot])
                plgpu.barrier_wait(outs.full.at[slot])
                # Everything lies keys by queries: rows are those of dK and dV.
                logits = (k_smem, q_smem.transpose((1, 0)))
                d_probabilities = (v_smem, d_out_smem.transpose((1, 0)))

                def d_logits(p, dp):
                    delta = plgpu.load(delta_smem, layout=BY_COLUMN)
                    return (p * (dp - lax.broadcast_in_dim(delta, p.shape, [1]))).astype(dtype)

                if masked or not overlaps:
                    # One product after the other: a mask needs the registers of the second.
                    p = probabilities(multiply(*logits))
                    (dv,) = multiply_add([(dv, p.astype(dtype), d_out_smem)], staging)
                    ds = d_logits(p, multiply(*d_probabilities))
                    (dk,) = multiply_add([(dk, ds, q_smem)], staging)
                else:
                    p, dp = multiply_both(logits, d_probabilities, probabilities)
                    products = [(dv, p.astype(dtype), d_out_smem), (dk, d_logits(p, dp), q_smem)]
                    dv, dk = multiply_add(products, staging)
                plgpu.barrier_arrive(outs.free.at[slot])
                plgpu.barrier_arrive(queries.free.at[slot])
                return dk, dv

            state = zeros((ROWS, head_dim)), zeros((ROWS, head_dim))
            num_masked = item.num_leading * (repeats * walk.pieces)
            num_steps = item.count * (repeats * walk.pieces)
            if problem.all_masked or problem.causal:
                state = lax.fori_loop(0, num_masked, lambda *x: step(*x, masked=True), state)
            if not problem.all_masked:
                state = lax.fori_loop(
                    num_masked, num_steps, lambda *x: step(*x, masked=False), state
                )
            dk, dv = state
            k_smem[...] = (dk * problem.scale).astype(dtype)
            v_smem[...] = dv.astype(dtype)
            plgpu.commit_smem()

            @pl.when(item.valid)
            def _():
                for ref, array in ((k_smem, dk_gmem), (v_smem, dv_gmem)):
                    plgpu.copy_smem_to_gmem(ref, array.at[item.batch, rows, item.head])

            plgpu.wait_smem_to_gmem(0)

    slots, tile = walk.slots, walk.tile
    consumers = NUM_COMPUTE // walk.rings
    rows_of_each = (NUM_COMPUTE, ROWS)
    dk, dv = launch(
        body,
        {"operands": operands, "lists": lists},
        problem=problem,
        walk=walk,
        out_type=[jax.ShapeDtypeStruct(operands.k.shape, operands.k.dtype)] * 2,
        scratch={
            "k": matrix_smem((*rows_of_each, head_dim), dtype),
            "v": matrix_smem((*rows_of_each, head_dim), dtype),
            "q": matrix_smem((slots, tile, head_dim), dtype),
            "d_out": matrix_smem((slots, tile, head_dim), dtype),
            "staging": None if problem.in_registers else matrix_smem((*rows_of_each, tile), dtype),
            "lse": plgpu.SMEM((slots, tile), jnp.float32),
            "delta": plgpu.SMEM((slots, tile), jnp.float32),
            "kv_mask": plgpu.SMEM(rows_of_each, jnp.int32) if problem.has_kv_mask else None,
            "segments": plgpu.SMEM(rows_of_each, jnp.int32) if problem.has_segments else None,
            "streamed_segments": plgpu.SMEM((slots, tile), jnp.int32)
            if problem.has_segments
            else None,
            "resident_full": plgpu.Barrier(
                num_arrivals=2 + problem.has_kv_mask + problem.has_segments,
                num_barriers=NUM_COMPUTE,
            ),
            "q_full": plgpu.Barrier(num_arrivals=2 + problem.has_segments, num_barriers=slots),
            "q_free": plgpu.Barrier(num_arrivals=consumers, num_barriers=slots),
            "d_out_full": plgpu.Barrier(num_arrivals=2, num_barriers=slots),
            "d_out_free": plgpu.Barrier(num_arrivals=consumers, num_barriers=slots),
        },
        name="block_sparse_attention_backward_keys",
    )
    return dk, dv
