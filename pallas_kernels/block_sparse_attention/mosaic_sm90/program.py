"""A program of the Hopper attention kernels: whose lists it walks, and what lies where.

Two warpgroups compute and one copies, as told in `pallas_kernels.hopper`. What stays (64 rows for
each computing warpgroup) is called resident, what is copied tile by tile is called streamed.

*Rings.* A list belongs to one block of the resident side. Where that block has 128 rows, the two
computing warpgroups take 64 each and share one ring of streamed tiles. Where it has 64 rows, each
has a list and a ring of its own, so that one computes exponentials while the other keeps the tensor
cores busy. The copying warpgroup fills both in turns, and waits for a free slot of the first before
it turns to the second: the one that is ahead waits once it has used up its ring.

Letters: B T S N K H I J as everywhere (`sparsejax.types`).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention.mosaic_sm90.tile_lists import TileLists
from pallas_kernels.block_sparse_attention.mosaic_sm90.tiles import load_vector, make_mask
from pallas_kernels.block_sparse_attention.mosaic_sm90.walk import (
    Item,
    Problem,
    Walk,
    count_programs,
    find_item,
    locate,
    walk_list,
)
from pallas_kernels.hopper.budget import NUM_COMPUTE, ROWS
from pallas_kernels.hopper.launch import launch_kernel
from pallas_kernels.hopper.layouts import BY_COLUMN
from pallas_kernels.hopper.ring import Ring, describe_ring
from pallas_kernels.hopper.shared_memory import matrix_smem
from pallas_kernels.hopper.turns import Turns, describe_turns


class Share(NamedTuple):
    """What one computing warpgroup works on.

    Attributes:
      lists: TileLists of references to global memory.
      item: Item, the list it walks.
      start: int32, position of its first row.
      smem: name -> reference [64, ...]: what is resident, loaded, and scratch memory.
      rings: a Ring for each group of streamed arrays, in the order in which a step uses them.
      turns: its turns on the tensor cores, one for each step.
      find_again: function () -> (Item, int32), `item` and `start` read once more: whoever needs
        them after the last step alone need not hold them in registers until then.
    """

    problem: Problem
    walk: Walk
    lists: TileLists
    item: Item
    start: Any
    smem: dict[str, Any]
    rings: Sequence[Ring]
    turns: Turns
    find_again: Callable[[], tuple[Item, Any]]

    def locate(self, step: Any) -> tuple[Any, Any]:
        """Find the streamed tile of one step.

        Args:
          step: int32.

        Returns:
          tuple of int32, the first position of the tile, and the kept bits of its block.
        """
        _, start, bits = locate(self.problem, self.walk, self.lists, self.item, step)
        return start, bits

    def wait_ahead(self, step: Any, *rings: Ring) -> None:
        """Wait for the tiles of a step, if there is one, in the step before.

        Products run meanwhile. A loop that waits also keeps ptxas from moving arithmetic behind the
        wait for these products, where nothing would run beside it.

        Args:
          step: int32.
          *rings: whose tiles.
        """

        @pl.when(step < self.turns.steps)
        def _():
            for ring in rings:
                ring.wait(ring.find_slot(step))

    def walk_list(
        self, step: Callable[..., Any], state: Any, *, first_step: Callable[..., Any] | None = None
    ) -> Any:
        """Take all steps of the list, see `walk.walk_list`.

        Args:
          step: function (int32, state, masked=bool) -> state.
          state: what the steps carry.
          first_step: as `step`, takes its place in the first step of the list.

        Returns:
          state after the last step.
        """
        return walk_list(self.problem, self.walk, self.item, step, state, first_step=first_step)


def mask_by_query(
    share: Share,
    shape: tuple[int, ...],
    located: tuple[Any, Any],
    tile: dict[str, Any],
    segments: Any,
) -> tuple[Any, Any]:
    """Make the mask of a tile of resident queries by streamed keys, see `make_mask`.

    Args:
      shape: (queries, keys).
      located: what `Share.locate` returned of the tile.
      tile: name -> reference, what of the keys is streamed.
      segments: int32[queries] or None.

    Returns:
      tuple of bool arrays of the shape, or None for all True: the positions that are kept and
      visible, and those of them that `kv_mask` leaves.
    """
    key_start, bits = located
    return make_mask(
        share.problem,
        shape,
        query_axis=0,
        query_start=share.start,
        key_start=key_start,
        bits=bits,
        kv_mask=load_vector(tile, "kv_mask", BY_COLUMN),
        query_segments=segments,
        key_segments=load_vector(tile, "segments", BY_COLUMN),
    )


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
    """Write the results of a computing warpgroup to global memory, and wait until they are read.

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

    # The program may end meanwhile: the writes themselves are waited for by whoever comes next.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


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
    gmem: Mapping[str, Any],
    rings: Sequence[Ring],
) -> None:
    """Copy all tiles of a program's items into their rings, as fast as they are used.

    Args:
      lists: TileLists of references to global memory.
      items: one Item for each of the rings that lie side by side.
      gmem: name -> reference to global memory, of all that the rings hold.
      rings: the first Ring for each group of arrays, in the order in which a step uses them.
    """

    def find_tile(item, step):
        head, start, _ = locate(problem, walk, lists, item, step)
        return head, start

    num_steps = [item.count * walk.steps_per_entry for item in items]

    def copy_step(step, upcoming):
        following = []
        for number, (item, steps, (head, start)) in enumerate(
            zip(items, num_steps, upcoming, strict=True)
        ):
            own = [ring.beside(number) for ring in rings]
            slot = own[0].find_slot(step)
            # The tile of `stages` steps ago; after the last step, so that no barrier is left.
            was_filled = (step >= walk.stages) & (step < steps + walk.stages)
            for ring in own:
                ring.wait_until_free(slot, was_filled=was_filled)

                @pl.when(step < steps)
                def _(ring=ring, slot=slot, item=item, head=head, start=start):
                    for name in ring.smem:
                        ring.copy(select(gmem[name], item, head, start, walk.tile), name, slot)

            # Read now what the next step needs: global memory is slow to answer.
            following.append(find_tile(item, jnp.minimum(step + 1, jnp.maximum(steps - 1, 0))))
        return tuple(following)

    longest = functools.reduce(jnp.maximum, num_steps)
    first = tuple(find_tile(item, jnp.int32(0)) for item in items)
    lax.fori_loop(0, longest + walk.stages, copy_step, first)


class _Scratch(NamedTuple):
    """Shared memory: scratch types, and in the kernel references.

    Attributes:
      resident: name -> [2, 64, ...], what stays of each computing warpgroup.
      own: name -> [2, ...], other memory of each computing warpgroup.
      resident_full: barriers, [2]: what stays is there.
      rings: see `describe_ring`; one for each group of streamed arrays.
      turns: see `describe_turns`.
    """

    resident: dict[str, Any]
    own: dict[str, Any]
    resident_full: Any
    rings: list[Any]
    turns: Any


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
      compute: function (Share, *outputs), run by each computing warpgroup; outputs are references
        to global memory.
      operands: name -> array, None where there is none.
      lists: TileLists to walk.
      resident: names of operands that stay in shared memory.
      streamed: names of operands, by Ring, in the order in which a step uses them.
      out_type: what the kernel returns.
      scratch: name -> scratch type [2, ...], other shared memory of the computing warpgroups.
      name: str, of the kernel.

    Returns:
      list of arrays.
    """
    operands = {key: array for key, array in operands.items() if array is not None}
    resident = [key for key in resident if key in operands]
    streamed = [[key for key in keys if key in operands] for keys in streamed]

    def make_program(inputs, outputs, scratch):
        gmem, lists = inputs
        rings = [Ring(*ring, stages=walk.stages) for ring in scratch.rings]

        def copy():
            items = [find_item(problem, walk, lists, number) for number in range(walk.rings)]
            copy_tiles(problem, walk, lists, items, gmem, rings)

        def compute_share(warpgroup):
            share = _take_share(problem, walk, lists, gmem, resident, scratch, rings, warpgroup)
            compute(share, *outputs)

        return copy, compute_share

    return launch_kernel(
        make_program,
        (operands, lists),
        out_type=list(out_type),
        scratch=_describe_scratch(problem, walk, operands, resident, streamed, scratch or {}),
        num_programs=count_programs(problem, walk),
        name=name,
        approx_math=True,
    )


def _describe_scratch(
    problem: Problem,
    walk: Walk,
    operands: Mapping[str, Any],
    resident: Sequence[str],
    streamed: Sequence[Sequence[str]],
    own: Mapping[str, Any],
) -> _Scratch:
    def tile_smem(keys, *shape):
        return {
            key: matrix_smem((*shape, problem.head_dim), operands[key].dtype)
            if operands[key].ndim == 4
            else plgpu.SMEM(shape, operands[key].dtype)
            for key in keys
        }

    staging = matrix_smem((NUM_COMPUTE, ROWS, walk.tile), problem.dtype)
    readers = NUM_COMPUTE // walk.rings
    return _Scratch(
        resident=tile_smem(resident, NUM_COMPUTE, ROWS),
        own={**own} if problem.in_registers else {**own, "staging": staging},
        resident_full=plgpu.Barrier(num_arrivals=len(resident), num_barriers=NUM_COMPUTE),
        rings=[
            describe_ring(tile_smem(keys, walk.slots, walk.tile), copies=len(keys), readers=readers)
            for keys in streamed
        ],
        turns=describe_turns(),
    )


def _take_share(
    problem: Problem,
    walk: Walk,
    lists: TileLists,
    gmem: Mapping[str, Any],
    resident: Sequence[str],
    scratch: _Scratch,
    rings: Sequence[Ring],
    warpgroup: Any,
) -> Share:
    """Find what a computing warpgroup works on, and load what stays of it."""
    has_ring = walk.rings == NUM_COMPUTE
    number = warpgroup if has_ring else 0

    def find():
        item = find_item(problem, walk, lists, number)
        return item, item.block * walk.block + (0 if has_ring else warpgroup * ROWS)

    item, start = find()
    smem = {key: ref.at[warpgroup] for key, ref in (scratch.resident | scratch.own).items()}
    ready = scratch.resident_full.at[warpgroup]
    head = item.head if walk.parts == 1 else lax.div(item.head, jnp.int32(walk.parts))
    for key in resident:
        tile = select(gmem[key], item, head, start, ROWS)
        plgpu.copy_gmem_to_smem(tile, smem[key], ready)
    plgpu.barrier_wait(ready)
    own = [ring.beside(number) for ring in rings]
    other = find_item(problem, walk, lists, 1 - number) if has_ring else item
    steps, others = (each.count * walk.steps_per_entry for each in (item, other))
    turns = Turns(scratch.turns, warpgroup, steps, others)
    return Share(problem, walk, lists, item, start, smem, own, turns, find)
