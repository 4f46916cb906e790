"""The mean softmax map on Hopper tensor cores.

A program owns a tile of the result, [128 queries, 128 keys], and keeps its sum in registers while
it goes through all examples and heads: two warpgroups compute, 64 queries each, and a third copies
the queries, keys and lse of the next heads to shared memory ahead of them. Nothing of a single
head's map is written.

Letters: B T S N K H as everywhere (`sparsejax.types`).
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention_map.call import MapArrays, MapFacts
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.block_sparse_attention.mosaic_sm90.program import (
    COMPUTE_REGISTERS,
    COPY_REGISTERS,
)
from pallas_kernels.block_sparse_attention.mosaic_sm90.tiles import (
    BY_COLUMN,
    BY_ROW,
    LAYOUT,
    LOG2_E,
    matrix_smem,
    multiply,
    zeros,
)
from pallas_kernels.block_sparse_attention.mosaic_sm90.walk import NUM_COMPUTE, ROWS
from pallas_kernels.dispatch import check_hopper
from pallas_kernels.mosaic_call import call_mosaic

HEAD_DIMS = (32, 64, 128, 256)
TILE = NUM_COMPUTE * ROWS
# Heads in flight: queries and keys of one take 64 KB at H = 128, 128 KB at H = 256.
_MOST_STAGES = 3
# Tiles of queries that are taken together before the next tile of keys, for the cache.
_GROUP = 8


def check(facts: MapFacts) -> None:
    """Refuse what the kernel does not do.

    Raises:
      NotImplementedError: with the reason.
    """
    check_hopper()
    if facts.dtype not in ("bfloat16", "float16"):
        raise NotImplementedError(
            f"the Hopper kernel takes bfloat16 and float16, got {facts.dtype}"
        )
    if facts.head_dim not in HEAD_DIMS:
        raise NotImplementedError(
            f"the Hopper kernel takes head dims {HEAD_DIMS}, got H={facts.head_dim}"
        )
    if facts.num_queries % TILE or facts.num_keys % TILE:
        raise NotImplementedError(
            f"the Hopper kernel takes lengths that are multiples of {TILE}, "
            f"got T={facts.num_queries}, S={facts.num_keys}"
        )


def run(arrays: MapArrays, facts: MapFacts) -> jax.Array:
    """Average the maps of all heads, tile by tile of the result.

    A = 1/(B N) sum_bn exp(q_bn k_bn^T / sqrt(H) - lse_bn)

    Without `lse` the forward kernel of block-sparse attention computes it first: one more product
    of queries and keys, one with keys in place of values, and an output like q that is dropped.

    Returns:
      f32[T, S].

    Numerics:
      Products accumulate in f32; scores, exponentials and sums are f32, in one order: a repeated
      call agrees to the bit.
    """
    q_BTNH, k_BSKH, kv_mask_BS, lse = arrays
    if lse is None:
        _, lse = block_sparse_attention(
            q_BTNH,
            k_BSKH,
            k_BSKH,
            None,
            block_q=TILE,
            block_kv=TILE,
            causal=facts.causal,
            kv_mask=kv_mask_BS,
            # A NaN of theirs can reach the output alone, for logits are masked first.
            removed_keys_finite=True,
            return_lse=True,
            implementation="mosaic_sm90",
        )
    # A row that sees nothing has no probabilities: exp(s - inf) = 0.
    lse2_BNT = jnp.where(lse > -jnp.inf, lse * LOG2_E, jnp.inf).swapaxes(1, 2)
    copied = {"q": q_BTNH, "k": k_BSKH, "lse": lse2_BNT}
    if kv_mask_BS is not None:
        copied["kv_mask"] = kv_mask_BS.astype(jnp.int32)
    return _launch(copied, causal=facts.causal)


def _launch(arrays: dict[str, jax.Array], *, causal: bool) -> jax.Array:
    B, T, N, H = arrays["q"].shape
    S, K = arrays["k"].shape[1:3]
    dtype = arrays["q"].dtype
    grid = T // TILE, S // TILE
    scale = H**-0.5 * LOG2_E
    stages = 1 if H > 128 else _MOST_STAGES
    shapes = {
        "q": matrix_smem((stages, TILE, H), dtype),
        "k": matrix_smem((stages, TILE, H), dtype),
        "lse": plgpu.SMEM((stages, TILE), jnp.float32),
        "kv_mask": plgpu.SMEM((stages, TILE), jnp.int32),
    }
    rings = [shapes[name] for name in arrays]
    full = plgpu.Barrier(num_arrivals=len(arrays), num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=NUM_COMPUTE, num_barriers=stages)

    def kernel(*refs):
        gmem = dict(zip(arrays, refs, strict=False))
        out_gmem = refs[len(arrays)]
        smem = dict(zip(arrays, refs[len(arrays) + 1 :], strict=False))
        full, free = refs[-2:]
        tile = plgpu.planar_snake(lax.axis_index("tile"), grid, 0, _GROUP)
        query, key = (pl.multiple_of(x * TILE, TILE) for x in tile)
        # A tile above the diagonal is zeros.
        num_steps = jnp.where(query >= key, B * N, 0) if causal else jnp.int32(B * N)
        warpgroup = lax.axis_index("warpgroup")

        def copy_step(step, _):
            slot = lax.rem(step, jnp.int32(stages))

            @pl.when(step >= stages)
            def _():
                plgpu.barrier_wait(free.at[slot])

            example, head = lax.div(step, jnp.int32(N)), lax.rem(step, jnp.int32(N))
            queries, keys = pl.ds(query, TILE), pl.ds(key, TILE)
            places = {
                "q": (example, queries, head),
                "k": (example, keys, lax.div(head, jnp.int32(N // K))),
                "lse": (example, head, queries),
                "kv_mask": (example, keys),
            }
            for name, ref in gmem.items():
                plgpu.copy_gmem_to_smem(ref.at[places[name]], smem[name].at[slot], full.at[slot])

        @pl.when(warpgroup == NUM_COMPUTE)
        def _copy():
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
            lax.fori_loop(0, num_steps, copy_step, None)

            def drain(step, _):
                plgpu.barrier_wait(free.at[lax.rem(step, jnp.int32(stages))])

            # So that no barrier is left with an arrival nobody waited for.
            lax.fori_loop(jnp.maximum(num_steps - stages, 0), num_steps, drain, None)

        def add_step(step, acc, *, rows):
            slot = lax.rem(step, jnp.int32(stages))
            plgpu.barrier_wait(full.at[slot])
            s = multiply(smem["q"].at[slot, rows], smem["k"].at[slot].transpose((1, 0)))
            lse = plgpu.load(smem["lse"].at[slot, rows], layout=BY_ROW)
            present = None
            if "kv_mask" in smem:
                present = plgpu.load(smem["kv_mask"].at[slot], layout=BY_COLUMN)
            plgpu.barrier_arrive(free.at[slot])
            p = jnp.exp2(s * scale - lax.broadcast_in_dim(lse, s.shape, [0]))
            if present is not None:
                p = jnp.where(lax.broadcast_in_dim(present, s.shape, [1]) != 0, p, 0.0)
            return acc + p

        @pl.when(warpgroup < NUM_COMPUTE)
        def _compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            first = pl.multiple_of(warpgroup * ROWS, ROWS)
            add = functools.partial(add_step, rows=pl.ds(first, ROWS))
            acc = lax.fori_loop(0, num_steps, add, zeros((ROWS, TILE)))
            if causal:
                # Once for all heads: what stands above the diagonal, infinity too, is dropped.
                q_at, k_at = (
                    plgpu.broadcasted_iota(jnp.int32, acc.shape, axis, layout=LAYOUT) + start
                    for axis, start in ((0, query + first), (1, key))
                )
                acc = jnp.where(q_at >= k_at, acc, 0.0)
            out_gmem[pl.ds(query + first, ROWS), pl.ds(key, TILE)] = acc * (1 / (B * N))

    kernel.__name__ = "mean_attention_map"
    return call_mosaic(
        kernel,
        *arrays.values(),
        out_type=jax.ShapeDtypeStruct((T, S), jnp.float32),
        scratch_types=[*rings, full, free],
        grid=(grid[0] * grid[1],),
        grid_names=("tile",),
        num_threads=NUM_COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
