"""A program of the Hopper attention kernels: who copies, who computes, and what lies where.

Every program has three warpgroups: two that compute, and one that copies tiles from global to
shared memory ahead of them. What stays (64 rows for each computing warpgroup) is called resident,
what is copied tile by tile is called streamed.

*Rings.* A list belongs to one block of the resident side. Where that block has 128 rows, the two
computing warpgroups take 64 each and share one ring of streamed tiles. Where it has 64 rows, each
has a list and a ring of its own, so that one computes exponentials while the other keeps the tensor
cores busy. The copying warpgroup fills both in turns, and waits for a free slot of the first before
it turns to the second: the one that is ahead waits once it has used up its ring.

Letters: B T S N K H I J as everywhere (`sparsejax.types`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention.mosaic_sm90.tile_lists import TileLists
from pallas_kernels.block_sparse_attention.mosaic_sm90.tiles import matrix_smem
from pallas_kernels.block_sparse_attention.mosaic_sm90.walk import (
    NUM_COMPUTE,
    ROWS,
    Item,
    Problem,
    Walk,
    count_programs,
    find_item,
    locate,
)
from pallas_kernels.mosaic_call import call_mosaic

# Registers per thread, of 65536 for 384 threads: a copying thread needs few.
COMPUTE_REGISTERS, COPY_REGISTERS = 240, 24


class Group(NamedTuple):
    """Streamed arrays that are copied, waited for and given back together.

    Attributes:
      gmem: name -> reference to the array in global memory.
      smem: name -> reference [slots, tile, ...].
      full: barriers, [slots]: the tile is there.
      free: barriers, [slots]: the tile has been used.
    """

    gmem: dict[str, Any]
    smem: dict[str, Any]
    full: Any
    free: Any

    def wait(self, slot: Any) -> dict[str, Any]:
        """Wait until a slot is full.

        Args:
          slot: int32, which.

        Returns:
          name -> reference [tile, ...].
        """
        plgpu.barrier_wait(self.full.at[slot])
        return {name: ref.at[slot] for name, ref in self.smem.items()}

    def give_back(self, slot: Any) -> None:
        """Let a slot be filled again.

        Args:
          slot: int32, which.
        """
        plgpu.barrier_arrive(self.free.at[slot])


class Share(NamedTuple):
    """What one computing warpgroup works on.

    Attributes:
      item: Item, the list it walks.
      start: int32, position of its first row.
      smem: name -> reference [64, ...]: what is resident, loaded, and scratch memory.
      first_slot: int32, where its ring begins.
      stages: int, slots of its ring.
      find_again: function () -> (Item, int32), `item` and `start` read once more: whoever needs
        them after the last step alone need not hold them in registers until then.
    """

    item: Item
    start: Any
    smem: dict[str, Any]
    first_slot: Any
    stages: int
    find_again: Callable[[], tuple[Item, Any]]

    def find_slot(self, step: Any) -> Any:
        """Find the slot that the tile of a step is copied to.

        Args:
          step: int32.

        Returns:
          int32.
        """
        return self.first_slot + lax.rem(step, jnp.int32(self.stages))


def select(array: Any, item: Item, head: Any, start: Any, size: int) -> Any:
    """Select a tile in global memory.

    Args:
      array: reference [B, T, N, H], [B, N, T] or [B, T]; keys likewise.
      item: Item that the tile is for.
      head: int32, ignored where there are no heads.
      start: int32, first position, a multiple of the size.
      size: int, positions.

    Returns:
      reference [size, H] or [size].
    """
    positions = pl.ds(pl.multiple_of(start, size), size)
    axes = {4: (positions, head), 3: (head, positions), 2: (positions,)}[len(array.shape)]
    return array.at[item.batch, *axes]


def write(share: Share, outputs: Sequence[tuple[jax.Array, Any, Any]]) -> None:
    """Write the results of a computing warpgroup to global memory, and wait for it.

    Args:
      outputs: for each, the array [64, ...], shared memory to put it in, and the reference to
        global memory.
    """
    for array, smem, _ in outputs:
        smem[...] = array.astype(smem.dtype)
    plgpu.commit_smem()

    @pl.when(share.item.valid)
    def _():
        for _, smem, gmem in outputs:
            plgpu.copy_smem_to_gmem(
                smem, select(gmem, share.item, share.item.head, share.start, ROWS)
            )

    plgpu.wait_smem_to_gmem(0)


def write_parts(share: Share, outputs: Sequence[tuple[jax.Array, Any]]) -> None:
    """Write the sums over a part of a group of query heads to global memory, in f32.

    They go there from registers: a tile of f32 is twice as large as the tiles in shared memory that
    `write` puts its results in. Four threads store 32 bytes of a row, a whole sector, at a time.

    Args:
      outputs: for each, the array f32[64, H], and the reference to global memory, f32[B, S, X, H]
        with X = `walk.heads`.
    """
    item, start = share.find_again()

    @pl.when(item.valid)
    def _():
        for array, gmem in outputs:
            select(gmem, item, item.head, start, ROWS)[...] = array


def copy_tiles(
    problem: Problem,
    walk: Walk,
    lists: TileLists,
    items: Sequence[Item],
    groups: Sequence[Group],
) -> None:
    """Copy all tiles of a program's items into their rings, as fast as they are used.

    Args:
      lists: TileLists of references to global memory.
      items: one Item for each ring.
      groups: Groups in the order in which a step uses them.
    """

    def find_tile(item, step):
        head, start, _ = locate(problem, walk, lists, item, step)
        return head, start

    num_steps = [item.count * walk.steps_per_entry for item in items]

    def copy_step(step, upcoming):
        slot = lax.rem(step, jnp.int32(walk.stages))
        following = []
        for ring, (item, steps, (head, start)) in enumerate(
            zip(items, num_steps, upcoming, strict=True)
        ):
            place = ring * walk.stages + slot
            # The tile of `stages` steps ago; after the last step, so that no barrier is left.
            used = (step >= walk.stages) & (step < steps + walk.stages)
            for group in groups:

                @pl.when(used)
                def _(group=group, place=place):
                    plgpu.barrier_wait(group.free.at[place])

                @pl.when(step < steps)
                def _(group=group, place=place, item=item, head=head, start=start):
                    for name, gmem in group.gmem.items():
                        plgpu.copy_gmem_to_smem(
                            select(gmem, item, head, start, walk.tile),
                            group.smem[name].at[place],
                            group.full.at[place],
                        )

            # Read now what the next step needs: global memory is slow to answer.
            following.append(find_tile(item, jnp.minimum(step + 1, jnp.maximum(steps - 1, 0))))
        return tuple(following)

    longest = functools.reduce(jnp.maximum, num_steps)
    first = tuple(find_tile(item, jnp.int32(0)) for item in items)
    lax.fori_loop(0, longest + walk.stages, copy_step, first)


def launch(
    compute: Callable[..., None],
    operands: dict[str, Any],
    lists: TileLists,
    *,
    problem: Problem,
    walk: Walk,
    resident: Sequence[str],
    streamed: Sequence[Sequence[str]],
    out_type: Sequence[jax.ShapeDtypeStruct],
    scratch: dict[str, Any] | None = None,
    name: str,
) -> Any:
    """Run a kernel: fill the rings, and let two warpgroups of each program compute.

    Args:
      compute: function (Share, Groups, TileLists of references, *outputs), run by each computing
        warpgroup; outputs are references to global memory.
      operands: name -> array, None where there is none.
      lists: TileLists to walk.
      resident: names of operands that stay in shared memory.
      streamed: names of operands, by Group, in the order in which a step uses them.
      out_type: what the kernel returns.
      scratch: name -> scratch type [2, ...], other shared memory of the computing warpgroups.
      name: str, of the kernel.

    Returns:
      list of arrays.
    """
    operands = {key: array for key, array in operands.items() if array is not None}
    resident = [key for key in resident if key in operands]
    streamed = [[key for key in keys if key in operands] for keys in streamed]
    staging = matrix_smem((NUM_COMPUTE, ROWS, walk.tile), problem.dtype)

    def tile_smem(keys, *shape):
        return {
            key: matrix_smem((*shape, problem.head_dim), operands[key].dtype)
            if operands[key].ndim == 4
            else plgpu.SMEM(shape, operands[key].dtype)
            for key in keys
        }

    def ring_smem(keys):
        return (
            tile_smem(keys, walk.slots, walk.tile),
            plgpu.Barrier(num_arrivals=len(keys), num_barriers=walk.slots),
            plgpu.Barrier(num_arrivals=NUM_COMPUTE // walk.rings, num_barriers=walk.slots),
        )

    scratch_types, scratch_tree = jax.tree.flatten(
        (
            tile_smem(resident, NUM_COMPUTE, ROWS),
            (scratch or {}) | ({} if problem.in_registers else {"staging": staging}),
            plgpu.Barrier(num_arrivals=len(resident), num_barriers=NUM_COMPUTE),
            [ring_smem(keys) for keys in streamed],
        )
    )
    inputs, input_tree = jax.tree.flatten((operands, lists))

    def kernel(*refs):
        ends = len(inputs), len(inputs) + len(out_type)
        gmem, lists = jax.tree.unflatten(input_tree, refs[: ends[0]])
        outputs = refs[ends[0] : ends[1]]
        resident_smem, scratch_smem, resident_full, rings = jax.tree.unflatten(
            scratch_tree, refs[ends[1] :]
        )
        groups = [
            Group({key: gmem[key] for key in smem}, smem, full, free) for smem, full, free in rings
        ]
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == NUM_COMPUTE)
        def _copy():
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
            items = [find_item(problem, walk, lists, ring) for ring in range(walk.rings)]
            copy_tiles(problem, walk, lists, items, groups)

        @pl.when(warpgroup < NUM_COMPUTE)
        def _compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            has_ring = walk.rings == NUM_COMPUTE
            ring = warpgroup if has_ring else 0

            def find():
                item = find_item(problem, walk, lists, ring)
                return item, item.block * walk.block + (0 if has_ring else warpgroup * ROWS)

            item, start = find()
            smem = {key: ref.at[warpgroup] for key, ref in (resident_smem | scratch_smem).items()}
            ready = resident_full.at[warpgroup]
            head = item.head if walk.parts == 1 else lax.div(item.head, jnp.int32(walk.parts))
            for key in resident:
                tile = select(gmem[key], item, head, start, ROWS)
                plgpu.copy_gmem_to_smem(tile, smem[key], ready)
            plgpu.barrier_wait(ready)
            share = Share(item, start, smem, ring * walk.stages, walk.stages, find)
            compute(share, groups, lists, *outputs)

    kernel.__name__ = name
    return call_mosaic(
        kernel,
        *inputs,
        out_type=list(out_type),
        scratch_types=scratch_types,
        grid=(count_programs(problem, walk),),
        grid_names=("program",),
        num_threads=NUM_COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
