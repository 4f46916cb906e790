"""The averaged softmax map on Hopper tensor cores.

A program owns 128 by 128 entries of the map. Two warpgroups hold 64 rows of the sum each in
registers while all heads of all examples pass by: a third copies queries, keys and the softmax's
denominators ahead of them into a ring. So the work is one product of queries and keys, and what
goes to memory is one map.

Letters: B T S N K H as everywhere (`sparsejax.types`).
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention.mosaic_sm90_tiles import (
    BY_COLUMN,
    BY_ROW,
    LAYOUT,
    LOG2_E,
    matrix_smem,
    multiply,
    zeros,
)
from pallas_kernels.dispatch import check_hopper

TILE = 128
"""Queries and keys of a program's part of the map."""
_ROWS, _NUM_COMPUTE = 64, 2
_HEAD_DIMS = (64, 128)
# Registers per thread: a copying thread needs few.
_COMPUTE_REGISTERS, _COPY_REGISTERS = 240, 24


def mean_attention_map_mosaic_sm90(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    kv_mask_BS: jax.Array | None,
    lse_BTN: jax.Array,
    *,
    causal: bool,
) -> jax.Array:
    """Launch the kernel.

    Args:
      q_BTNH: bf16 or f16[B, T, N, H].
      k_BSKH: [B, S, K, H].
      kv_mask_BS: bool[B, S] or None.
      lse_BTN: f32[B, T, N]; -inf where a query sees no key.
      causal: bool.

    Returns:
      f32[T, S].

    Raises:
      NotImplementedError: if the device, a type or a size is another.
    """
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    _check(q_BTNH, T, S, H)
    # A query without a key: 2^(s - inf) = 0.
    lse_BNT = jnp.where(jnp.isneginf(lse_BTN), jnp.inf, lse_BTN * LOG2_E).swapaxes(1, 2)
    stages = 3 if H == 64 else 2
    names = ["q", "k", "lse"] + ["kv_mask"] * (kv_mask_BS is not None)

    def kernel(*refs):
        gmem = dict(zip(names, refs, strict=False))
        map_gmem = refs[len(names)]
        smem = dict(zip(scratch, refs[len(names) + 1 :], strict=True))
        row, column = lax.axis_index("row") * TILE, lax.axis_index("column") * TILE
        warpgroup = lax.axis_index("warpgroup")
        count = jnp.int32(B * N)
        if causal:
            count = jnp.where(column > row, 0, count)

        @pl.when(warpgroup == _NUM_COMPUTE)
        def _copy():
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")

            def copy_head(step, _):
                slot = lax.rem(step, jnp.int32(stages))
                example, head = lax.div(step, jnp.int32(N)), lax.rem(step, jnp.int32(N))

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(smem["free"].at[slot])

                queries = pl.ds(pl.multiple_of(row, TILE), TILE)
                keys = pl.ds(pl.multiple_of(column, TILE), TILE)
                tiles = {
                    "q": gmem["q"].at[example, queries, head],
                    "k": gmem["k"].at[example, keys, lax.div(head, jnp.int32(N // K))],
                    "lse": gmem["lse"].at[example, head, queries],
                }
                if kv_mask_BS is not None:
                    tiles["kv_mask"] = gmem["kv_mask"].at[example, keys]
                for name, tile in tiles.items():
                    plgpu.copy_gmem_to_smem(tile, smem[name].at[slot], smem["full"].at[slot])

            lax.fori_loop(0, count, copy_head, None)

            def drain(step, _):
                plgpu.barrier_wait(smem["free"].at[lax.rem(step, jnp.int32(stages))])

            # So that no barrier is left with an arrival nobody waited for.
            lax.fori_loop(jnp.maximum(count - stages, 0), count, drain, None)

        @pl.when(warpgroup < _NUM_COMPUTE)
        def _compute():
            plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
            own = pl.ds(pl.multiple_of(warpgroup * _ROWS, _ROWS), _ROWS)

            def add_head(step, total):
                slot = lax.rem(step, jnp.int32(stages))
                plgpu.barrier_wait(smem["full"].at[slot])
                s = multiply(smem["q"].at[slot, own], smem["k"].at[slot].transpose((1, 0)))
                lse = plgpu.load(smem["lse"].at[slot, own], layout=BY_ROW)
                p = jnp.exp2(s * (H**-0.5 * LOG2_E) - lax.broadcast_in_dim(lse, s.shape, [0]))
                if kv_mask_BS is not None:
                    seen = plgpu.load(smem["kv_mask"].at[slot], layout=BY_COLUMN)
                    p = jnp.where(lax.broadcast_in_dim(seen, s.shape, [1]) != 0, p, 0.0)
                plgpu.barrier_arrive(smem["free"].at[slot])
                return total + p

            total = lax.fori_loop(0, count, add_head, zeros((_ROWS, TILE))) / (B * N)
            if causal:
                # Once for all heads: what a key ahead has added, however large, is dropped.
                q_at, kv_at = (
                    plgpu.broadcasted_iota(jnp.int32, total.shape, axis, layout=LAYOUT) + start
                    for axis, start in ((0, row + warpgroup * _ROWS), (1, column))
                )
                total = jnp.where(q_at >= kv_at, total, 0.0)
            staging = smem["staging"].at[warpgroup]
            staging[...] = total
            plgpu.commit_smem()
            start = pl.multiple_of(row + warpgroup * _ROWS, _ROWS)
            across = pl.ds(pl.multiple_of(column, TILE), TILE)
            plgpu.copy_smem_to_gmem(staging, map_gmem.at[pl.ds(start, _ROWS), across])
            plgpu.wait_smem_to_gmem(0)

    scratch: dict[str, Any] = {
        "q": matrix_smem((stages, TILE, H), q_BTNH.dtype),
        "k": matrix_smem((stages, TILE, H), q_BTNH.dtype),
        "lse": plgpu.SMEM((stages, TILE), jnp.float32),
    }
    operands = [q_BTNH, k_BSKH, lse_BNT]
    if kv_mask_BS is not None:
        scratch["kv_mask"] = plgpu.SMEM((stages, TILE), jnp.int32)
        operands.append(kv_mask_BS.astype(jnp.int32))
    scratch |= {
        "staging": plgpu.SMEM((_NUM_COMPUTE, _ROWS, TILE), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=len(operands), num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=_NUM_COMPUTE, num_barriers=stages),
    }
    kernel.__name__ = "mean_attention_map"
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((T, S), jnp.float32),
        scratch_types=list(scratch.values()),
        grid=(T // TILE, S // TILE),
        grid_names=("row", "column"),
        num_threads=_NUM_COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*operands)


def _check(q_BTNH, T, S, H):
    check_hopper()
    name = "implementation='mosaic_sm90' of mean_attention_map"
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"{name} takes bfloat16 and float16, got {q_BTNH.dtype}")
    if H not in _HEAD_DIMS:
        raise NotImplementedError(f"{name} takes head dims {_HEAD_DIMS}, got {H}")
    if T % TILE or S % TILE:
        raise NotImplementedError(
            f"{name} takes lengths in multiples of {TILE}, got {T} queries and {S} keys"
        )
