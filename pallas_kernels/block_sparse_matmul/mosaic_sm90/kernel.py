"""The kernel of block-sparse products on Hopper: each tile of the result is a sum over a list.

Programs are those of `pallas_kernels.hopper`, and stay. A step copies tiles of both operands; the
computing warpgroups multiply one pair each. A list that is empty is a tile of zeros. What differs
between the products stands in a `Plan`.

*Two blocks.* A tile of dw may have two blocks of a row, which share the left operand: fewer bytes
are copied for a product. Which tiles do is data, so that the loop is there for one and for two.

*Clusters.* Two programs take row tiles below one another of the same list. Each copies half of the
right operand, to both.

*Announcements.* Which block of the result a list is for, and how long it is, stands in global
memory, which is slow to answer. The copying warpgroup reads it a tile or two ahead and hands it
over through a ring of its own, so that nobody waits for it between two tiles.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_matmul.mosaic_sm90.plan import (
    TILE,
    Lists,
    Plan,
    Start,
    Tile,
    count_stages,
)
from pallas_kernels.block_sparse_matmul.mosaic_sm90.program import (
    ANNOUNCED,
    Operands,
    Program,
    describe_scratch,
)
from pallas_kernels.hopper.launch import launch_kernel
from pallas_kernels.hopper.layouts import BY_COLUMN, LAYOUT
from pallas_kernels.hopper.ring import Ring
from pallas_kernels.mosaic_fences import fence_products


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
      num_programs: int, as many as the GPU has processors; a multiple of `plan.cluster`.

    Returns:
      matrix, dtype of lhs.
    """
    stages = count_stages(plan)
    num_tiles = plan.count_shared_tiles(lists.owners.shape[0])
    num_clusters = min(num_programs // plan.cluster, num_tiles)

    def make_program(operands, out, scratch):
        ring = Ring(*scratch.ring, stages=stages, shared=["rhs"] if plan.cluster > 1 else [])
        announced = Ring(*scratch.announced, stages=ANNOUNCED)
        program = Program(plan, operands, out, scratch, ring, announced, num_clusters)
        return lambda: _copy(program), lambda warpgroup: _compute(program, warpgroup)

    return launch_kernel(
        make_program,
        Operands(lhs, rhs, lists, bias),
        out_type=jax.ShapeDtypeStruct(out_shape, lhs.dtype),
        scratch=describe_scratch(plan, stages, lhs.dtype, has_bias=bias is not None),
        num_programs=num_clusters,
        name=f"block_sparse_matmul_{plan.name}",
        cluster=plan.cluster,
    )


def _copy(program: Program) -> None:
    """Copy the operands of all tiles of a program."""

    def copy_tile(row_tile, unit, state):
        number, used = state
        numbers = program.read_list(unit)
        program.announced.announce(number, **numbers)
        owners = [numbers[name] for name in ("owner", "other") if name in numbers]
        used = lax.fori_loop(
            0,
            numbers["steps"],
            lambda step, used: _copy_step(program, row_tile, unit, owners, step, used),
            used,
        )
        return number + 1, used

    numbers, used = program.for_each_tile(copy_tile, (jnp.int32(0), jnp.int32(0)))
    program.announced.drain(numbers)
    program.ring.drain(used)


def _copy_step(
    program: Program, row_tile: Any, unit: Any, owners: Sequence[Any], step: Any, used: Any
) -> Any:
    """Copy the operands of one step of a list, after `used` steps; return how many were used."""
    plan, operands, ring = program.plan, program.operands, program.ring
    entries = operands.lists.entries
    position, piece = lax.div(step, plan.steps_per_entry), lax.rem(step, plan.steps_per_entry)
    # Read before the wait: global memory is slow to answer.
    entry = position if entries is None else entries[unit, position]
    slot = ring.claim(used)

    def copy(side, tile, gmem, block=0):
        for part in range(tile.parts):
            start = tile.find(row_tile, owners[block], entry, piece, part)
            ring.copy(_select(gmem, start, tile.shape), side, slot, block * tile.parts + part)

    copy("lhs", plan.lhs, operands.lhs)
    copy("rhs", plan.rhs, operands.rhs)
    for block, owner in enumerate(owners[1:], start=1):

        @pl.when(owner >= 0)
        def _(block=block):
            copy("rhs", plan.rhs, operands.rhs, block)

        @pl.when(owner < 0)
        def _():
            # In the place of copies, which are waited for.
            for _ in range(plan.rhs.parts):
                ring.put(slot)

    return used + 1


def _compute(program: Program, warpgroup: Any) -> None:
    """Compute a warpgroup's part of all tiles of a program."""
    exchange = program.scratch.other

    def compute_tile(row_tile, unit, state):
        del unit
        number, used = state
        owner, steps, *others = program.announced.hear(number, *program.announced.smem)
        slot = program.ring.find_slot(used)

        def compute(*owners):
            _compute_blocks(program, warpgroup, row_tile, owners, steps, slot)

        if not others:
            compute(owner)
        for other in others:
            pl.when(other >= 0)(lambda other=other: compute(owner, other))
            pl.when((other < 0) & (owner >= 0))(lambda: compute(owner))
        return number + 1, used + steps

    if exchange is not None:

        @pl.when(warpgroup == 0)
        def _():
            plgpu.barrier_arrive(exchange.free)

    program.for_each_tile(compute_tile, (jnp.int32(0), jnp.int32(0)))
    plgpu.wait_smem_to_gmem(0)
    if exchange is not None:

        @pl.when(warpgroup == 1)
        def _():
            plgpu.barrier_wait(exchange.free)


def _compute_blocks(
    program: Program, warpgroup: Any, row_tile: Any, owners: Sequence[Any], steps: Any, slot: Any
) -> None:
    """Compute and write a warpgroup's part of a tile, whose first step has a slot."""
    _copy_bias(program, warpgroup, owners[0])
    totals = _sum_steps(program, warpgroup, steps, slot, len(owners))
    for total, owner in zip(totals, owners, strict=True):
        total = _add_bias(program, warpgroup, total)
        if program.plan.is_split:
            _join_sums(program, warpgroup, total, row_tile, owner)
        else:
            _write(program, warpgroup, total, row_tile, owner)


def _sum_steps(
    program: Program, warpgroup: Any, steps: Any, slot: Any, num_blocks: int
) -> Sequence[jax.Array]:
    """Sum the products of a list, the first from a slot; return the sum of each block."""
    plan, ring = program.plan, program.ring

    def multiply_all(*accs):
        def multiply_step(step, slot):
            smem = ring.wait(slot)
            lhs = _select_part(smem["lhs"], plan.lhs, warpgroup)
            # Sums come from the step before in other registers, as far as ptxas can tell.
            fence_products()
            for block, acc in enumerate(accs):
                plgpu.wgmma(acc, lhs, _select_part(smem["rhs"], plan.rhs, warpgroup, block))
            plgpu.wgmma_wait(num_blocks)

            # What is started now still reads its slot; that of the step before is done.
            @pl.when(step > 0)
            def _():
                ring.give_back(ring.previous_slot(slot))

            return ring.next_slot(slot)

        last = lax.fori_loop(0, steps, multiply_step, slot)
        return [acc[...] for acc in accs], last

    totals, slot = pl.run_scoped(
        multiply_all, *num_blocks * [plgpu.WGMMAAccumulatorRef(plan.shape, jnp.float32)]
    )

    @pl.when(steps > 0)
    def _():
        ring.give_back(ring.previous_slot(slot))

    return totals


def _select_part(smem: Any, tile: Tile, warpgroup: Any, block: int = 0) -> Any:
    part = smem.at[block * tile.parts + (warpgroup if tile.parts > 1 else 0)]
    return part.transpose((1, 0)) if tile.is_transposed else part


def _copy_bias(program: Program, warpgroup: Any, owner: Any) -> None:
    """Start to copy the bias of a tile's columns, if there is one."""
    scratch, bias, columns = program.scratch, program.operands.bias, program.plan.shape[1]
    if bias is None:
        return
    plgpu.copy_gmem_to_smem(
        bias.at[pl.ds(pl.multiple_of(owner * columns, columns), columns)],
        scratch.bias.at[warpgroup],
        scratch.bias_full.at[warpgroup],
    )


def _add_bias(program: Program, warpgroup: Any, total: jax.Array) -> jax.Array:
    """Wait for the bias of a tile's columns and add it, if there is one."""
    scratch = program.scratch
    if scratch.bias is None:
        return total
    plgpu.barrier_wait(scratch.bias_full.at[warpgroup])
    added = plgpu.load(scratch.bias.at[warpgroup], layout=BY_COLUMN)
    return total + lax.broadcast_in_dim(added.astype(jnp.float32), total.shape, [1])


def _join_sums(
    program: Program, warpgroup: Any, total: jax.Array, row_tile: Any, owner: Any
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


def _write(program: Program, warpgroup: Any, total: jax.Array, row_tile: Any, owner: Any) -> None:
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
