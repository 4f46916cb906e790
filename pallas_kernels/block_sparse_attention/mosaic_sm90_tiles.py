"""What the Hopper attention kernels share: work items, rings of tiles, masks, products.

Every kernel has three warpgroups a program: two that compute, and one that copies tiles from
global to shared memory ahead of them. What stays (64 rows for each computing warpgroup) is called
resident, what is copied tile by tile is called streamed.

*Rings.* A list belongs to one block of the resident side. Where that block has 128 rows, the two
computing warpgroups take 64 each and share one ring of streamed tiles. Where it has 64 rows, each
has a list and a ring of its own; the copying warpgroup serves both in turns. Neither waits for
the other, so that one computes exponentials while the other keeps the tensor cores busy.

*Order.* Programs start in the order of `TileLists`: very long lists first, then one head after
the other with long lists first. The hardware starts a program wherever one has ended, so uneven
lists leave no processor idle, and a head's keys stay in the cache while it is worked on.

Letters: B T S N K H I J as everywhere (`sparsejax.types`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention.tile_lists import BITS, Grain, TileLists

ROWS = 64
"""Rows of one computing warpgroup: what one tensor-core instruction of Hopper covers."""

NUM_COMPUTE = 2
# Registers per thread, of 65536 for 384 threads: a copying thread needs few.
COMPUTE_REGISTERS, COPY_REGISTERS = 240, 24
SHARED_MEMORY_BYTES = 232_448
# Barriers, and what Mosaic itself reserves.
_SPARE_BYTES = 4096
_MAX_STAGES = 4

LAYOUT = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = LAYOUT.reduce(1), LAYOUT.reduce(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Static facts of one call.

    Attributes:
      batch: int, B.
      num_queries: int, T.
      num_keys: int, S.
      num_heads: int, N.
      num_kv_heads: int, K.
      head_dim: int, H.
      dtype: str, of the operands.
      grain: Grain, the tile blocks.
      mask_batch: int, 1 or B, masks over the batch.
      mask_heads: int, 1 or N, masks over the heads.
      causal: bool, query t sees keys 0..t.
      has_kv_mask: bool, keys are removed by position.
      has_segments: bool, queries see their own segment.
      scale: float, factor of the logits.
      zero_logits: bool, pruned visible positions count as logits of 0.
      in_registers: bool, left operands of products are registers, as on a GPU; the interpreter
        needs them in shared memory.
    """

    batch: int
    num_queries: int
    num_keys: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    grain: Grain
    mask_batch: int
    mask_heads: int
    causal: bool
    has_kv_mask: bool
    has_segments: bool
    scale: float
    zero_logits: bool
    in_registers: bool

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.num_heads // self.num_kv_heads

    @property
    def all_masked(self) -> bool:
        """Whether no tile can do without a mask."""
        return self.has_kv_mask or self.has_segments or self.grain.rows * self.grain.columns > 1


class Walk(NamedTuple):
    """How one kernel walks its lists.

    Attributes:
      block: int, rows of a resident block, 64 or 128.
      num_blocks: int, resident blocks.
      heads: int, heads of the resident side.
      mask_heads: int, of these, how many have lists of their own.
      tile: int, positions of a streamed tile.
      pieces: int, tiles of one list entry.
      stages: int, tiles of a ring.
    """

    block: int
    num_blocks: int
    heads: int
    mask_heads: int
    tile: int
    pieces: int
    stages: int

    @property
    def rings(self) -> int:
        """Rings of a program: one for each list."""
        return NUM_COMPUTE if self.block == ROWS else 1

    @property
    def slots(self) -> int:
        """Tiles that the rings of a program hold together."""
        return self.rings * self.stages


def make_walk(
    problem: Problem,
    *,
    over_queries: bool,
    resident_bytes: int,
    streamed_bytes: int,
    max_tile: int,
) -> Walk:
    """Choose tile and ring sizes that fit in shared memory.

    Args:
      problem: Problem.
      over_queries: bool, queries are resident and keys streamed, or the reverse.
      resident_bytes: int, of one row of a computing warpgroup.
      streamed_bytes: int, of one streamed position.
      max_tile: int, the widest tile that leaves registers enough.

    Returns:
      Walk.

    Raises:
      NotImplementedError: if not even two narrow tiles fit.
    """
    grain = problem.grain
    block, streamed_block = (
        (grain.block_q, grain.block_kv) if over_queries else (grain.block_kv, grain.block_q)
    )
    heads = problem.num_heads if over_queries else problem.num_kv_heads
    rings = NUM_COMPUTE if block == ROWS else 1
    free = SHARED_MEMORY_BYTES - _SPARE_BYTES - NUM_COMPUTE * ROWS * resident_bytes
    for tile in (128, 64):
        stages = min(free // (rings * tile * streamed_bytes), _MAX_STAGES)
        if tile <= min(max_tile, streamed_block) and stages >= 2:
            return Walk(
                block=block,
                num_blocks=(problem.num_queries if over_queries else problem.num_keys) // block,
                heads=heads,
                mask_heads=1 if problem.mask_heads == 1 else heads,
                tile=tile,
                pieces=streamed_block // tile,
                stages=stages,
            )
    raise NotImplementedError(
        f"at head dim {problem.head_dim}, two tiles of 64 positions for each of {rings} lists do "
        f"not fit in the {SHARED_MEMORY_BYTES} bytes of shared memory; blocks of 128 share a list"
    )


class Item(NamedTuple):
    """One list and what it belongs to; traced scalars.

    Attributes:
      valid: bool, False for the place beside the last item of an odd number.
      unit: int32, which list.
      batch: int32.
      head: int32, of the resident side.
      block: int32, resident block.
      count: int32, entries on the list; 0 if not valid.
      num_leading: int32, see `TileLists`.
    """

    valid: jax.Array
    unit: jax.Array
    batch: jax.Array
    head: jax.Array
    block: jax.Array
    count: jax.Array
    num_leading: jax.Array


def count_programs(problem: Problem, walk: Walk) -> int:
    """Return the size of the grid: one program for each `walk.rings` items.

    Args:
      problem: Problem.
      walk: Walk.

    Returns:
      int.
    """
    return -(-problem.batch * walk.heads * walk.num_blocks // walk.rings)


def find_item(problem: Problem, walk: Walk, lists: TileLists, ring: Any) -> Item:
    """Find the item of one ring of this program.

    Args:
      problem: Problem.
      walk: Walk.
      lists: TileLists of references to global memory.
      ring: int or int32, which ring.

    Returns:
      Item.
    """
    num_units = problem.mask_batch * walk.mask_heads * walk.num_blocks
    head_copies = walk.heads // walk.mask_heads
    copies = problem.batch // problem.mask_batch * head_copies
    index = lax.axis_index("program") * walk.rings + ring
    valid = index < num_units * copies
    index = jnp.where(valid, index, 0)
    num_long = lists.num_long[0]
    is_long = index < num_long * copies
    # Copies are batch entries and heads that share their lists: one after the other.
    span = jnp.where(is_long, num_long, num_units - num_long)
    offset = jnp.where(is_long, 0, num_long)
    index = index - offset * copies
    copy = lax.div(index, span)
    unit = lists.order[offset + lax.rem(index, span)]
    mask, block = lax.div(unit, walk.num_blocks), lax.rem(unit, walk.num_blocks)
    return Item(
        valid=valid,
        unit=unit,
        batch=lax.div(mask, walk.mask_heads) + lax.div(copy, head_copies),
        head=lax.rem(mask, walk.mask_heads) + lax.rem(copy, head_copies),
        block=block,
        count=jnp.where(valid, lists.counts[unit], 0),
        num_leading=jnp.where(valid, lists.num_leading[unit], 0),
    )


class Group(NamedTuple):
    """Streamed arrays that are copied, waited for and given back together.

    Attributes:
      gmem: tuple of functions (item, head, start) -> the tile of one array in global memory.
      smem: tuple of references, [slots, tile, ...], to match.
      full: barriers, [slots]: the tile is there.
      free: barriers, [slots]: the tile has been used.
    """

    gmem: tuple[Callable[..., Any], ...]
    smem: tuple[Any, ...]
    full: Any
    free: Any

    def at(self, slot):
        """Return the references of one slot.

        Args:
          slot: int32, which.

        Returns:
          tuple of references, [tile, ...].
        """
        return tuple(ref.at[slot] for ref in self.smem)


def copy_tiles(
    walk: Walk,
    items: Sequence[Item],
    groups: Sequence[Group],
    num_steps: Sequence[Any],
    locate: Callable[[Item, Any], tuple[Any, Any, Any]],
) -> None:
    """Copy all tiles of a program's items into their rings, as fast as they are used.

    Args:
      walk: Walk.
      items: one Item for each ring.
      groups: Groups in the order in which a step uses them.
      num_steps: int32 for each ring.
      locate: (item, step) -> streamed head, first position of the tile, entry.
    """

    def copy_step(step, upcoming):
        slot = lax.rem(step, jnp.int32(walk.stages))
        following = []
        for ring, (item, steps, (head, start, _)) in enumerate(
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
                    for gmem, smem in zip(group.gmem, group.smem, strict=True):
                        plgpu.copy_gmem_to_smem(
                            gmem(item, head, start), smem.at[place], group.full.at[place]
                        )

            # Read now what the next step needs: global memory is slow to answer.
            following.append(locate(item, jnp.minimum(step + 1, jnp.maximum(steps - 1, 0))))
        return tuple(following)

    longest = functools.reduce(jnp.maximum, num_steps)
    first = tuple(locate(item, jnp.int32(0)) for item in items)
    lax.fori_loop(0, longest + walk.stages, copy_step, first)


def read_entry(lists: TileLists, item: Item, position: Any) -> tuple[Any, Any]:
    """Read a list entry.

    Args:
      lists: TileLists of references to global memory.
      item: Item.
      position: int32, on its list.

    Returns:
      tuple of int32, the index, and int32, the kept bits.
    """
    entry = lists.entries[item.unit, position]
    return lax.div(entry, BITS), lax.rem(entry, BITS)


def make_mask(
    problem: Problem,
    shape: tuple[int, ...],
    *,
    query_axis: int,
    query_start: Any,
    key_start: Any,
    bits: Any,
    kv_mask: Any = None,
    query_segments: Any = None,
    key_segments: Any = None,
) -> tuple[Any, Any]:
    """Make the mask of one tile of logits.

    Args:
      problem: Problem.
      shape: of the tile.
      query_axis: int, the axis of the tile that queries lie on; keys lie on the other.
      query_start: int32, position of the tile's first query.
      key_start: int32, position of the tile's first key.
      bits: int32, kept blocks of the tile block, used where a tile has several.
      kv_mask: int32[keys] or None, 0 removes a key.
      query_segments: int32[queries] or None.
      key_segments: int32[keys] or None.

    Returns:
      tuple of bool arrays of the shape, or None for all True: the positions that are kept and
      visible, and those of them that `kv_mask` leaves.
    """

    def spread(vector, axis):
        return lax.broadcast_in_dim(vector, shape, [axis])

    key_axis = 1 - query_axis
    conditions = []
    grain = problem.grain
    if problem.causal or grain.rows * grain.columns > 1:
        q_at, kv_at = (
            plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=LAYOUT) + start
            for axis, start in ((query_axis, query_start), (key_axis, key_start))
        )
        if problem.causal:
            conditions.append(q_at >= kv_at)
        if grain.rows * grain.columns > 1:
            place = jnp.zeros_like(q_at)
            if grain.rows > 1:
                place += jnp.where((q_at & 32) != 0, 2, 0)
            if grain.columns > 1:
                place += jnp.where((kv_at & 32) != 0, 1, 0)
            conditions.append(((bits >> place) & 1) != 0)
    if query_segments is not None:
        conditions.append(spread(query_segments, query_axis) == spread(key_segments, key_axis))
    seen = functools.reduce(jnp.logical_and, conditions) if conditions else None
    attended = seen
    if kv_mask is not None:
        present = spread(kv_mask, key_axis) != 0
        attended = present if seen is None else seen & present
    return seen, attended


def zeros(shape: tuple[int, ...], layout: Any = LAYOUT, value: float = 0.0) -> jax.Array:
    """Return an f32 array in registers.

    Args:
      shape: tuple of int.
      layout: how it lies in registers.
      value: float, of all elements.

    Returns:
      f32 array.
    """
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def multiply(lhs_smem: Any, rhs_smem: Any) -> jax.Array:
    """Multiply two matrices in shared memory on the tensor cores, and wait.

    Args:
      lhs_smem: reference, [64, X].
      rhs_smem: reference, [X, Y].

    Returns:
      f32[64, Y].
    """

    def run(acc):
        plgpu.wgmma(acc, lhs_smem, rhs_smem)
        return acc[...]

    return pl.run_scoped(
        run, plgpu.WGMMAAccumulatorRef((lhs_smem.shape[0], rhs_smem.shape[1]), jnp.float32)
    )


def multiply_both(
    first: tuple[Any, Any],
    second: tuple[Any, Any],
    use_first: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Multiply two pairs of matrices, and use the first product while the second is computed.

    Args:
      first: pair of references, [64, X] and [X, Y].
      second: pair of references, [64, Z] and [Z, Y].
      use_first: function of the first product.

    Returns:
      tuple of what `use_first` returned, and the second product, f32[64, Y].
    """
    shapes = [(lhs.shape[0], rhs.shape[1]) for lhs, rhs in (first, second)]

    def run(acc, other_acc):
        plgpu.wgmma(acc, *first)
        plgpu.wgmma(other_acc, *second)
        used = use_first(plgpu.wgmma_accumulator_load(acc, wait_n=1))
        return used, other_acc[...]

    return pl.run_scoped(run, *(plgpu.WGMMAAccumulatorRef(shape, jnp.float32) for shape in shapes))


def multiply_add(
    products: Sequence[tuple[jax.Array, jax.Array, Any]], staging_smem: Any
) -> tuple[jax.Array, ...]:
    """Add products of matrices in registers and in shared memory, and wait for all of them.

    Args:
      products: for each, the accumulator f32[64, Y], the left operand [64, X], and a reference
        [X, Y] to the right one.
      staging_smem: reference [64, X] to put left operands in, or None to leave them in registers.

    Returns:
      tuple of the new accumulators, f32[64, Y].
    """
    if staging_smem is None:

        def run(accs):
            for acc, (_, lhs, rhs_smem) in zip(accs, products, strict=True):
                plgpu.wgmma(acc, lhs, rhs_smem)

        refs = tuple(plgpu.WGMMAAccumulatorRef.init(acc) for acc, _, _ in products)
        sums: Any = pl.run_state(run)(refs)
        return tuple(sums)
    results = []
    for acc, lhs, rhs_smem in products:
        staging_smem[...] = lhs
        plgpu.commit_smem()
        results.append(acc + multiply(staging_smem, rhs_smem))
    return tuple(results)


def matrix_smem(shape: tuple[int, ...], dtype: Any) -> Any:
    """Describe shared memory for matrices that tensor cores read.

    Args:
      shape: [..., rows, columns].
      dtype: of two bytes.

    Returns:
      scratch type of `plgpu.kernel`.
    """
    swizzle = min(128, 2 * shape[-1])
    # Type checkers take both classes for abstract.
    tiling: Any = plgpu.TilingTransform
    swizzling: Any = plgpu.SwizzleTransform
    transforms = (tiling((8, swizzle // 2)), swizzling(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def launch(
    body: Callable[..., None],
    operands: dict[str, Any],
    *,
    problem: Problem,
    walk: Walk,
    out_type: Any,
    scratch: dict[str, Any],
    name: str,
) -> Any:
    """Run a kernel whose operands and scratch memory have names.

    Args:
      body: function (operands, outputs, scratch) of references, the first and last by name.
      operands: name -> pytree of arrays, None where there is none.
      problem: Problem.
      walk: Walk.
      out_type: list of `jax.ShapeDtypeStruct`.
      scratch: name -> scratch type, None where there is none.
      name: str, of the kernel.

    Returns:
      list of arrays.
    """
    leaves, treedef = jax.tree.flatten(operands)
    num_outputs = len(out_type)

    def kernel(*refs):
        gmem = jax.tree.unflatten(treedef, refs[: len(leaves)])
        outputs = refs[len(leaves) : len(leaves) + num_outputs]
        smem = dict(zip(scratch, refs[len(leaves) + num_outputs :], strict=True))
        body(gmem, outputs, smem)

    kernel.__name__ = name
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=list(scratch.values()),
        grid=(count_programs(problem, walk),),
        grid_names=("program",),
        num_threads=NUM_COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*leaves)
