"""The kernel of block-sparse products on Hopper: each tile of the result is a sum over a list.

Programs are those of `pallas_kernels.hopper`, and stay. A step copies tiles of both operands; the
computing warpgroups multiply one pair each. A list that is empty is a tile of zeros. What differs
between the products stands in a `Plan`.

*Announcements.* Which block of the result a list is for, and how long it is, stands in global
memory, which is slow to answer. The copying warpgroup reads it a tile or two ahead and hands it
over through a ring of its own, so that nobody waits for it between two tiles.
"""

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir.dialects import nvvm

from pallas_kernels.block_sparse_matmul.mosaic_sm90.plan import (
    TILE,
    Lists,
    Plan,
    Start,
    Tile,
    count_stages,
)
from pallas_kernels.dispatch import is_interpreted
from pallas_kernels.hopper.budget import NUM_COMPUTE
from pallas_kernels.hopper.launch import for_each_tile, launch_kernel
from pallas_kernels.hopper.layouts import BY_COLUMN, LAYOUT
from pallas_kernels.hopper.ring import Ring, describe_ring
from pallas_kernels.hopper.shared_memory import matrix_smem

# Lists that are announced ahead.
_ANNOUNCED = 2


class _Operands(NamedTuple):
    """What the kernel reads: arrays, and in it references to global memory."""

    lhs: Any
    rhs: Any
    lists: Lists
    bias: Any


class _Exchange(NamedTuple):
    """Where the second warpgroup leaves its sum for the first.

    Attributes:
      smem: f32, the sum.
      full: barrier: it is there.
      free: barrier: it has been read.
    """

    smem: Any
    full: Any
    free: Any


class _Scratch(NamedTuple):
    """Shared memory: scratch types, and in the kernel references.

    Attributes:
      ring: see `describe_ring`; tiles of both operands, [slots, parts, ...].
      announced: the same; "owner" and "steps" of a list, int32[slots].
      staging: [2, ...], the result of each warpgroup.
      bias: [2, columns] or None.
      bias_full: barriers, [2], or None.
      other: _Exchange, or None where the warpgroups do not sum the same tile.
    """

    ring: Any
    announced: Any
    staging: Any
    bias: Any
    bias_full: Any
    other: Any


class _Program(NamedTuple):
    """What the warpgroups of a program share.

    Attributes:
      operands: _Operands in global memory.
      out: reference to the result in global memory.
      scratch: _Scratch.
      ring: Ring of the operands.
      announced: Ring of lists, one for each tile.
      num_programs: int, that share the tiles.
    """

    plan: Plan
    operands: _Operands
    out: Any
    scratch: _Scratch
    ring: Ring
    announced: Ring
    num_programs: int

    @property
    def num_tiles(self):
        return self.operands.lists.owners.shape[0] * self.plan.num_row_tiles

    def locate(self, tile):
        return self.plan.locate(tile, self.operands.lists.owners.shape[0])


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
    num_tiles = lists.owners.shape[0] * plan.num_row_tiles

    def make_program(operands, out, scratch):
        ring = Ring(*scratch.ring, stages=stages)
        announced = Ring(*scratch.announced, stages=_ANNOUNCED)
        program = _Program(plan, operands, out, scratch, ring, announced, num_programs)
        return lambda: _copy(program), lambda warpgroup: _compute(program, warpgroup)

    return launch_kernel(
        make_program,
        _Operands(lhs, rhs, lists, bias),
        out_type=jax.ShapeDtypeStruct(out_shape, lhs.dtype),
        scratch=_describe_scratch(plan, stages, lhs.dtype, has_bias=bias is not None),
        num_programs=min(num_programs, num_tiles),
        name=f"block_sparse_matmul_{plan.name}",
    )


def _describe_scratch(plan: Plan, stages: int, dtype: Any, *, has_bias: bool) -> _Scratch:
    smem = {
        side: matrix_smem((stages, tile.parts, *tile.shape), dtype)
        for side, tile in (("lhs", plan.lhs), ("rhs", plan.rhs))
    }
    bias = bias_full = other = None
    if has_bias:
        bias = plgpu.SMEM((NUM_COMPUTE, plan.shape[1]), dtype)
        bias_full = plgpu.Barrier(num_barriers=NUM_COMPUTE)
    if plan.is_split:
        barriers = plgpu.Barrier(num_barriers=1), plgpu.Barrier(num_barriers=1)
        other = _Exchange(matrix_smem(plan.shape, jnp.float32), *barriers)
    return _Scratch(
        ring=describe_ring(smem, copies=plan.lhs.parts + plan.rhs.parts, readers=NUM_COMPUTE),
        announced=describe_ring(
            {name: plgpu.SMEM((_ANNOUNCED,), jnp.int32) for name in ("owner", "steps")},
            copies=1,
            readers=NUM_COMPUTE,
        ),
        staging=matrix_smem((NUM_COMPUTE, *plan.shape), dtype),
        bias=bias,
        bias_full=bias_full,
        other=other,
    )


def _copy(program: _Program) -> None:
    """Copy the operands of all tiles of a program."""

    def copy_tile(tile, state):
        number, used = state
        row_tile, unit = program.locate(tile)
        owner = program.operands.lists.owners[unit]
        steps = program.operands.lists.counts[unit] * program.plan.steps_per_entry
        program.announced.announce(number, owner=owner, steps=steps)
        used = lax.fori_loop(
            0,
            steps,
            lambda step, used: _copy_step(program, row_tile, unit, owner, step, used),
            used,
        )
        return number + 1, used

    numbers, used = for_each_tile(
        copy_tile,
        (jnp.int32(0), jnp.int32(0)),
        num_tiles=program.num_tiles,
        num_programs=program.num_programs,
    )
    program.announced.drain(numbers)
    program.ring.drain(used)


def _copy_step(
    program: _Program, row_tile: Any, unit: Any, owner: Any, step: Any, used: Any
) -> Any:
    """Copy the operands of one step of a list, after `used` steps; return how many were used."""
    plan, operands = program.plan, program.operands
    entries = operands.lists.entries
    position, piece = lax.div(step, plan.steps_per_entry), lax.rem(step, plan.steps_per_entry)
    # Read before the wait: global memory is slow to answer.
    entry = position if entries is None else entries[unit, position]
    slot = program.ring.claim(used)
    for side, tile, gmem in (("lhs", plan.lhs, operands.lhs), ("rhs", plan.rhs, operands.rhs)):
        for part in range(tile.parts):
            start = tile.find(row_tile, owner, entry, piece, part)
            program.ring.copy(_select(gmem, start, tile.shape), side, slot, part)
    return used + 1


def _compute(program: _Program, warpgroup: Any) -> None:
    """Compute a warpgroup's part of all tiles of a program."""
    other = program.scratch.other

    def compute_tile(tile, state):
        number, slot = state
        row_tile, _ = program.locate(tile)
        owner, steps = program.announced.hear(number, "owner", "steps")
        _copy_bias(program, warpgroup, owner)
        total, slot = _sum_steps(program, warpgroup, steps, slot)
        total = _add_bias(program, warpgroup, total)
        if other is None:
            _write(program, warpgroup, total, row_tile, owner)
        else:
            _join_sums(program, warpgroup, total, row_tile, owner)
        return number + 1, slot

    if other is not None:

        @pl.when(warpgroup == 0)
        def _():
            plgpu.barrier_arrive(other.free)

    for_each_tile(
        compute_tile,
        (jnp.int32(0), jnp.int32(0)),
        num_tiles=program.num_tiles,
        num_programs=program.num_programs,
    )
    plgpu.wait_smem_to_gmem(0)
    if other is not None:

        @pl.when(warpgroup == 1)
        def _():
            plgpu.barrier_wait(other.free)


def _sum_steps(
    program: _Program, warpgroup: Any, steps: Any, slot: Any
) -> tuple[jax.Array, jax.Array]:
    """Sum the products of a list, the first from a slot; return the sum and the next slot."""
    plan, ring = program.plan, program.ring

    def multiply_all(acc):
        def multiply_step(step, slot):
            smem = ring.wait(slot)
            operands = [
                _select_part(smem[side], tile, warpgroup)
                for side, tile in (("lhs", plan.lhs), ("rhs", plan.rhs))
            ]
            # Sums come from the step before in other registers, as far as ptxas can tell.
            fence_products()
            plgpu.wgmma(acc, *operands)
            plgpu.wgmma_wait(1)

            # What is started now still reads its slot; that of the step before is done.
            @pl.when(step > 0)
            def _():
                ring.give_back(ring.previous_slot(slot))

            return ring.next_slot(slot)

        last = lax.fori_loop(0, steps, multiply_step, slot)
        return acc[...], last

    total, slot = pl.run_scoped(multiply_all, plgpu.WGMMAAccumulatorRef(plan.shape, jnp.float32))

    @pl.when(steps > 0)
    def _():
        ring.give_back(ring.previous_slot(slot))

    return total, slot


def _select_part(smem: Any, tile: Tile, warpgroup: Any) -> Any:
    part = smem.at[warpgroup if tile.parts > 1 else 0]
    return part.transpose((1, 0)) if tile.is_transposed else part


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


def _copy_bias(program: _Program, warpgroup: Any, owner: Any) -> None:
    """Start to copy the bias of a tile's columns, if there is one."""
    scratch, bias, columns = program.scratch, program.operands.bias, program.plan.shape[1]
    if bias is None:
        return
    plgpu.copy_gmem_to_smem(
        bias.at[pl.ds(pl.multiple_of(owner * columns, columns), columns)],
        scratch.bias.at[warpgroup],
        scratch.bias_full.at[warpgroup],
    )


def _add_bias(program: _Program, warpgroup: Any, total: jax.Array) -> jax.Array:
    """Wait for the bias of a tile's columns and add it, if there is one."""
    scratch = program.scratch
    if scratch.bias is None:
        return total
    plgpu.barrier_wait(scratch.bias_full.at[warpgroup])
    added = plgpu.load(scratch.bias.at[warpgroup], layout=BY_COLUMN)
    return total + lax.broadcast_in_dim(added.astype(jnp.float32), total.shape, [1])


def _join_sums(
    program: _Program, warpgroup: Any, total: jax.Array, row_tile: Any, owner: Any
) -> None:
    """Hand the sum of the second warpgroup to the first, which adds its own and writes both."""
    other = program.scratch.other

    @pl.when(warpgroup == 1)
    def _():
        plgpu.barrier_wait(other.free)
        other.smem[...] = total
        plgpu.barrier_arrive(other.full)

    @pl.when(warpgroup == 0)
    def _():
        plgpu.barrier_wait(other.full)
        added = plgpu.load(other.smem, layout=LAYOUT)
        plgpu.barrier_arrive(other.free)
        _write(program, warpgroup, total + added, row_tile, owner)


def _write(program: _Program, warpgroup: Any, total: jax.Array, row_tile: Any, owner: Any) -> None:
    """Start to write a warpgroup's tile of the result to global memory."""
    plan, staging = program.plan, program.scratch.staging.at[warpgroup]
    # The last tile may still be on its way out.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    staging[...] = total.astype(staging.dtype)
    plgpu.commit_smem()
    start = plan.find(row_tile, owner, warpgroup)
    plgpu.copy_smem_to_gmem(staging, _select(program.out, start, plan.shape))


def _select(gmem: Any, start: Start, shape: tuple[int, int]) -> Any:
    return gmem.at[
        tuple(
            pl.ds(pl.multiple_of(begin, TILE), size)
            for begin, size in zip(start, shape, strict=True)
        )
    ]
