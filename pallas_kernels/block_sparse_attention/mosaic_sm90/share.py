"""What one computing warpgroup of a Hopper attention kernel works on, and how it writes results.

Letters: B T S N K H I J as everywhere (`sparsejax.types`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu

from pallas_kernels.block_sparse_attention.mosaic_sm90.tiles import load_vector, make_mask
from pallas_kernels.block_sparse_attention.mosaic_sm90.walk import (
    Item,
    Problem,
    Walk,
    locate,
    walk_list,
)
from pallas_kernels.hopper.budget import ROWS
from pallas_kernels.hopper.layouts import BY_COLUMN
from pallas_kernels.hopper.ring import Ring
from pallas_kernels.hopper.turns import Turns


class Place(NamedTuple):
    """Where the tile of a step lies; int32.

    Attributes:
      rows_start: position of the warpgroup's first row, on the resident side.
      tile_start: position of the tile's first row, on the streamed side.
      bits: kept bits of its block, see `tile_lists.BITS`.
    """

    rows_start: Any
    tile_start: Any
    bits: Any


class Share(NamedTuple):
    """What one computing warpgroup works on: a list, and rows of the block that it belongs to.

    Attributes:
      entries: reference to those of `TileLists`, in global memory.
      find: function () -> (Item, int32), the list, and the position of the first row, read from
        shared memory: whoever needs them after the last step need not hold them in registers.
      smem: name -> reference [64, ...]: what is resident, loaded, and scratch memory.
      rings: a Ring for each group of streamed arrays, in the order in which a step uses them.
      turns: its turns on the tensor cores, one for each step, if it takes them.
      first: int32, its first step. Steps count on from list to list.
      end: int32, the step after its last.
    """

    problem: Problem
    walk: Walk
    entries: Any
    find: Callable[[], tuple[Item, Any]]
    smem: dict[str, Any]
    rings: Sequence[Ring]
    turns: Turns
    first: Any
    end: Any

    def locate(self, step: Any) -> Place:
        """Find where the streamed tile of one step lies, and this warpgroup's rows.

        Args:
          step: int32.
        """
        item, rows_start = self.find()
        step = step - item.first
        _, tile_start, bits = locate(self.problem, self.walk, self.entries, item, step)
        return Place(rows_start, tile_start, bits)

    def wait_ahead(self, step: Any, *rings: Ring) -> None:
        """Wait for the tiles of a step, if there is one, in the step before.

        Products run meanwhile. A loop that waits also keeps ptxas from moving arithmetic behind the
        wait for these products, where nothing would run beside it.

        Args:
          step: int32.
          *rings: whose tiles.
        """

        @pl.when(step < self.end)
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
        item, _ = self.find()
        ends = self.first, self.first + item.num_leading * self.walk.steps_per_entry, self.end
        return walk_list(self.problem, self.walk, ends, step, state, first_step=first_step)


def mask_by_query(
    share: Share,
    shape: tuple[int, ...],
    place: Place,
    tile: dict[str, Any],
    segments: Any,
) -> tuple[Any, Any]:
    """Make the mask of a tile of resident queries by streamed keys, see `make_mask`.

    Args:
      shape: (queries, keys).
      place: where the tile and the queries lie.
      tile: name -> reference, what of the keys is streamed.
      segments: int32[queries] or None.

    Returns:
      tuple of bool arrays of the shape, or None for all True: the positions that are kept and
      visible, and those of them that `kv_mask` leaves.
    """
    return make_mask(
        share.problem,
        shape,
        query_axis=0,
        query_start=place.rows_start,
        key_start=place.tile_start,
        bits=place.bits,
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
    """Start to write the results of a computing warpgroup to global memory.

    Args:
      outputs: for each, the array [64, ...], shared memory to put it in, which is read until the
        writes are waited for, and the reference to global memory.
    """
    for array, smem, _ in outputs:
        smem[...] = array.astype(smem.dtype)
    plgpu.commit_smem()
    item, start = share.find()

    @pl.when(item.valid)
    def _():
        for _, smem, gmem in outputs:
            plgpu.copy_smem_to_gmem(smem, select(gmem, item, item.head, start, ROWS))


def write_parts(share: Share, outputs: Sequence[tuple[jax.Array, Any]]) -> None:
    """Write the sums over a part of a group of query heads to global memory, in f32.

    They go there from registers: a tile of f32 is twice as large as the tiles in shared memory that
    `write` puts its results in. Four threads store 32 bytes of a row, a whole sector, at a time.

    Args:
      outputs: for each, the array f32[64, H], and the reference to global memory, f32[B, S, X, H]
        with X = `walk.heads`.
    """
    item, start = share.find()

    @pl.when(item.valid)
    def _():
        for array, gmem in outputs:
            select(gmem, item, item.head, start, ROWS)[...] = array
