"""A program of the Hopper kernels: tiles of the result, each a sum over a list, through one ring.

Three warpgroups: two that multiply, and one that copies tiles of both operands ahead of them into a
ring in shared memory. Programs stay: each takes every `num_programs`-th tile of the result, and the
ring runs on while a tile is written. A list that is empty is a tile of zeros.

What differs between the products stands in a `Plan`: which tiles a step reads, and how the two
warpgroups share them.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir.dialects import nvvm

from pallas_kernels.dispatch import is_interpreted
from pallas_kernels.mosaic_call import call_mosaic

NUM_COMPUTE = 2
TILE = 64
"""Rows of one tensor-core instruction, and how much of the contraction a step takes."""

SHARED_MEMORY_BYTES = 232_448
# Barriers, and what Mosaic itself reserves.
_SPARE_BYTES = 4096
_MAX_STAGES = 6
# Registers per thread, of 65536 for 384 threads: a copying thread needs few.
_COMPUTE_REGISTERS, _COPY_REGISTERS = 240, 24
_BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)

type Start = tuple[Any, Any]
"""Row and column, int or int32, where a tile begins."""


class Lists(NamedTuple):
    """Lists in the order in which they are started.

    Attributes:
      owners: int32[U], which block of the result a list is for.
      counts: int32[U], entries of each list.
      entries: int32[U, P], or None where the entry at a position is the position.
    """

    owners: jax.Array
    counts: jax.Array
    entries: jax.Array | None


class Tile(NamedTuple):
    """Tiles of an operand that a step reads.

    Attributes:
      shape: (rows, columns) of one.
      parts: int, 2 if each computing warpgroup has its own, 1 if they share one.
      is_transposed: bool, it is multiplied transposed.
      find: function (row_tile, owner, entry, piece, part) -> Start.
    """

    shape: tuple[int, int]
    parts: int
    is_transposed: bool
    find: Callable[[Any, Any, Any, Any, Any], Start]

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts."""
        return 2 * self.parts * math.prod(self.shape)


class Plan(NamedTuple):
    """One product.

    Attributes:
      name: str, of the kernel.
      lhs: Tile of the left operand, with two parts.
      rhs: Tile of the right operand.
      shape: (rows, columns) of the result that a computing warpgroup sums.
      is_split: bool, both warpgroups sum the same tile, over different steps.
      find: function (row_tile, owner, part) -> Start of a warpgroup's tile of the result.
      num_row_tiles: int, tiles that share a list.
      group: int, of these, how many are taken before the next list, for the cache.
    """

    name: str
    lhs: Tile
    rhs: Tile
    shape: tuple[int, int]
    is_split: bool
    find: Callable[[Any, Any, Any], Start]
    steps_per_entry: int = 1
    num_row_tiles: int = 1
    group: int = 1


def count_stages(plan: Plan) -> int:
    """Return how many steps the ring of a program holds.

    Returns:
      int, at most 6.
    """
    rows, columns = plan.shape
    fixed = NUM_COMPUTE * (2 * rows * columns + 2 * columns)
    if plan.is_split:
        fixed += 4 * rows * columns
    free = SHARED_MEMORY_BYTES - _SPARE_BYTES - fixed
    return min(free // (plan.lhs.num_bytes + plan.rhs.num_bytes), _MAX_STAGES)


def multiply_lists(
    lhs: jax.Array,
    rhs: jax.Array,
    lists: Lists,
    bias: jax.Array | None,
    out_shape: tuple[int, int],
    plan: Plan,
    *,
    num_programs: int,
) -> jax.Array:
    """Launch a kernel.

    Args:
      lhs: bf16 or f16 matrix, left operand.
      rhs: dtype of lhs, matrix.
      bias: [columns of the result] or None.
      out_shape: (rows, columns) of the result, whole tiles.
      num_programs: int, as many as the GPU has processors.

    Returns:
      matrix, dtype of lhs.
    """
    stages = count_stages(plan)
    num_lists = lists.owners.shape[0]
    num_tiles = num_lists * plan.num_row_tiles
    inputs, input_tree = jax.tree.flatten((lhs, rhs, lists, bias))
    rows, columns = plan.shape

    def locate(tile):
        """Return row tile and list: all lists, longest first, for one group of row tiles."""
        in_group = plan.group * num_lists
        first = lax.div(tile, in_group) * plan.group
        size = jnp.minimum(plan.num_row_tiles - first, plan.group)
        place = lax.rem(tile, in_group)
        return first + lax.rem(place, size), lax.div(place, size)

    def for_each_tile(body: Callable[..., Any], state: Any) -> Any:
        program = lax.axis_index("program")
        count = lax.div(num_tiles - program + num_programs - 1, num_programs)
        return lax.fori_loop(
            0, count, lambda i, state: body(*locate(program + i * num_programs), state), state
        )

    def kernel(*refs):
        lhs_gmem, rhs_gmem, lists, bias_gmem = jax.tree.unflatten(input_tree, refs[: len(inputs)])
        out_gmem, *refs = refs[len(inputs) :]
        smem = dict(zip(scratch, refs, strict=True))
        warpgroup = lax.axis_index("warpgroup")

        def count_steps(unit):
            return lists.counts[unit] * plan.steps_per_entry

        @pl.when(warpgroup == NUM_COMPUTE)
        def _copy():
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")

            def copy_tile(row_tile, unit, used):
                owner = lists.owners[unit]

                def copy_step(step, used):
                    position = lax.div(step, plan.steps_per_entry)
                    piece = lax.rem(step, plan.steps_per_entry)
                    # Read before the wait: global memory is slow to answer.
                    entry = position if lists.entries is None else lists.entries[unit, position]
                    slot = lax.rem(used, jnp.int32(stages))

                    @pl.when(used >= stages)
                    def _():
                        plgpu.barrier_wait(smem["free"].at[slot])

                    for side, gmem in (("lhs", lhs_gmem), ("rhs", rhs_gmem)):
                        tile: Tile = getattr(plan, side)
                        for part in range(tile.parts):
                            start = tile.find(row_tile, owner, entry, piece, part)
                            plgpu.copy_gmem_to_smem(
                                _select(gmem, start, tile.shape),
                                smem[side].at[slot, part],
                                smem["full"].at[slot],
                            )
                    return used + 1

                return lax.fori_loop(0, count_steps(unit), copy_step, used)

            used = for_each_tile(copy_tile, jnp.int32(0))

            def drain(i, _):
                plgpu.barrier_wait(smem["free"].at[lax.rem(i, jnp.int32(stages))])

            # So that no barrier is left with an arrival nobody waited for.
            lax.fori_loop(jnp.maximum(used - stages, 0), used, drain, None)

        @pl.when(warpgroup < NUM_COMPUTE)
        def _compute():
            plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")

            def sum_steps(steps, slot, acc):
                def multiply_step(step, slot):
                    plgpu.barrier_wait(smem["full"].at[slot])
                    operands = []
                    for side in ("lhs", "rhs"):
                        tile: Tile = getattr(plan, side)
                        ref = smem[side].at[slot, warpgroup if tile.parts > 1 else 0]
                        operands.append(ref.transpose((1, 0)) if tile.is_transposed else ref)
                    # Sums come from the step before in other registers, as far as ptxas can tell.
                    fence_products()
                    plgpu.wgmma(acc, *operands)
                    plgpu.wgmma_wait(1)

                    # What is started now still reads its slot; that of the step before is done.
                    @pl.when(step > 0)
                    def _():
                        plgpu.barrier_arrive(smem["free"].at[_before(slot, stages)])

                    return _after(slot, stages)

                slot = lax.fori_loop(0, steps, multiply_step, slot)
                return acc[...], slot

            def write(total, row_tile, owner):
                staging = smem["staging"].at[warpgroup]
                # The last tile may still be on its way out.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                staging[...] = total.astype(staging.dtype)
                plgpu.commit_smem()
                start = plan.find(row_tile, owner, warpgroup)
                plgpu.copy_smem_to_gmem(staging, _select(out_gmem, start, plan.shape))

            def compute_tile(row_tile, unit, slot):
                owner, steps = lists.owners[unit], count_steps(unit)
                if bias_gmem is not None:
                    start = pl.multiple_of(owner * columns, columns)
                    plgpu.copy_gmem_to_smem(
                        bias_gmem.at[pl.ds(start, columns)],
                        smem["bias"].at[warpgroup],
                        smem["bias_full"].at[warpgroup],
                    )
                total, slot = pl.run_scoped(
                    lambda acc: sum_steps(steps, slot, acc),
                    plgpu.WGMMAAccumulatorRef(plan.shape, jnp.float32),
                )

                @pl.when(steps > 0)
                def _():
                    plgpu.barrier_arrive(smem["free"].at[_before(slot, stages)])

                if bias_gmem is not None:
                    plgpu.barrier_wait(smem["bias_full"].at[warpgroup])
                    added = plgpu.load(smem["bias"].at[warpgroup], layout=_BY_COLUMN)
                    total += lax.broadcast_in_dim(added.astype(jnp.float32), total.shape, [1])
                if not plan.is_split:
                    write(total, row_tile, owner)
                    return slot

                @pl.when(warpgroup == 1)
                def _():
                    plgpu.barrier_wait(smem["other_free"])
                    smem["other"][...] = total
                    plgpu.barrier_arrive(smem["other_full"])

                @pl.when(warpgroup == 0)
                def _():
                    plgpu.barrier_wait(smem["other_full"])
                    other = plgpu.load(smem["other"], layout=plgpu.Layout.WGMMA)
                    plgpu.barrier_arrive(smem["other_free"])
                    write(total + other, row_tile, owner)

                return slot

            if plan.is_split:

                @pl.when(warpgroup == 0)
                def _():
                    plgpu.barrier_arrive(smem["other_free"])

            for_each_tile(compute_tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)
            if plan.is_split:

                @pl.when(warpgroup == 1)
                def _():
                    plgpu.barrier_wait(smem["other_free"])

    copies = plan.lhs.parts + plan.rhs.parts
    scratch = {
        "lhs": _matrix_smem((stages, plan.lhs.parts, *plan.lhs.shape), lhs.dtype),
        "rhs": _matrix_smem((stages, plan.rhs.parts, *plan.rhs.shape), rhs.dtype),
        "staging": _matrix_smem((NUM_COMPUTE, rows, columns), lhs.dtype),
        "full": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=NUM_COMPUTE, num_barriers=stages),
    }
    if bias is not None:
        scratch["bias"] = plgpu.SMEM((NUM_COMPUTE, columns), bias.dtype)
        scratch["bias_full"] = plgpu.Barrier(num_barriers=NUM_COMPUTE)
    if plan.is_split:
        scratch["other"] = _matrix_smem((rows, columns), jnp.float32)
        scratch["other_full"] = plgpu.Barrier(num_barriers=1)
        scratch["other_free"] = plgpu.Barrier(num_barriers=1)
    kernel.__name__ = f"block_sparse_matmul_{plan.name}"
    return call_mosaic(
        kernel,
        *inputs,
        out_type=jax.ShapeDtypeStruct(out_shape, lhs.dtype),
        scratch_types=list(scratch.values()),
        grid=(min(num_programs, num_tiles),),
        grid_names=("program",),
        num_threads=NUM_COMPUTE + 1,
        thread_name="warpgroup",
    )


def fence_products() -> None:
    """Let tensor-core products see registers that were written so far.

    Pallas does so when an accumulator is made and not in every step of a loop; ptxas would add it.
    """
    if is_interpreted():
        return

    @plgpu.inline_mgpu()
    def fence(_):
        nvvm.wgmma_fence_aligned()

    # Type checkers take the decorated function for one that still wants the launch context.
    run: Any = fence
    run()


def _select(gmem: Any, start: Start, shape: tuple[int, int]) -> Any:
    return gmem.at[
        tuple(
            pl.ds(pl.multiple_of(begin, TILE), size)
            for begin, size in zip(start, shape, strict=True)
        )
    ]


def _after(slot, stages):
    # Not a remainder, which costs registers.
    return jnp.where(slot == stages - 1, 0, slot + 1)


def _before(slot, stages):
    return jnp.where(slot == 0, stages - 1, slot - 1)


def _matrix_smem(shape: tuple[int, ...], dtype: Any) -> Any:
    """Describe shared memory for matrices with rows of whole 128 bytes."""
    # Type checkers take both classes for abstract.
    tiling: Any = plgpu.TilingTransform
    swizzling: Any = plgpu.SwizzleTransform
    transforms = (tiling((8, 128 // jnp.dtype(dtype).itemsize)), swizzling(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)
