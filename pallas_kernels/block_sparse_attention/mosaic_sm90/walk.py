"""How the Hopper attention kernels walk block lists: shapes, work items, steps.

A list belongs to one block of the side that stays in shared memory, the *resident* side: queries
for the output and dQ, keys for dK and dV. Its entries are blocks of the other side, which are
*streamed* tile by tile. A step computes one tile.

*Order.* Lists are taken in the order of `TileLists`: the longest first, and equal ones head by
head. A program that stays takes several, in rounds that go back and forth (`launch.for_each_tile`):
whoever has the longest of one round has the shortest of the next.

*Parts.* Several query heads may read one key head. Where dK and dV would otherwise have too few
work items for the device, the group is split in equal parts with an item each: see `choose_parts`.

Letters: B T S N K H I J as everywhere (`sparsejax.types`).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention.mosaic_sm90.tile_lists import BITS, Grain
from pallas_kernels.hopper.budget import NUM_COMPUTE, ROWS, SHARED_MEMORY_BYTES, SPARE_BYTES

_MAX_STAGES = 4


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
      over_queries: bool, queries are resident and keys streamed, or the reverse.
      block: int, rows of a resident block, 64 or 128.
      num_blocks: int, resident blocks.
      heads: int, heads of the resident side, each as often as its group has parts.
      mask_heads: int, of these, how many have lists of their own.
      parts: int, into which the query heads of a key head are split; 1 if queries are resident.
      members: int, query heads of a part; 1 if queries are resident.
      tile: int, positions of a streamed tile.
      pieces: int, tiles of one list entry.
      repeats: int, how often a list is walked: once for each query head that reads it.
      stages: int, tiles of a ring.
      resident_stages: int, lists whose resident tiles are in shared memory: those of the next one
        are copied ahead if there are two.
    """

    over_queries: bool
    block: int
    num_blocks: int
    heads: int
    mask_heads: int
    parts: int
    members: int
    tile: int
    pieces: int
    repeats: int
    stages: int
    resident_stages: int

    @property
    def stays(self) -> bool:
        """Whether a program goes on with the next lists after its first."""
        return self.resident_stages > 1

    @property
    def rings(self) -> int:
        """Rings of a program: one for each list."""
        return NUM_COMPUTE if self.block == ROWS else 1

    @property
    def steps_per_entry(self) -> int:
        """Steps that one list entry takes."""
        return self.repeats * self.pieces

    @property
    def slots(self) -> int:
        """Tiles that the rings of a program hold together."""
        return self.rings * self.stages


def choose_parts(num_items: int, rings: int, group: int, processors: int) -> int:
    """Choose into how many parts the query heads of a key head are split for dK and dV.

    A program takes `rings` items, and each part of a group is an item. The fewest equal parts are
    chosen that give every processor a program, or else all of the group: 64 programs of groups of
    four on 132 processors become 256 that take a quarter of the time each. A wave that is not quite
    full is split as well: if causal, the longest list has twice the mean, and only where items are
    shorter than a processor's share of the work can the hardware even that out.

    A part writes its sums in f32, which are added up afterwards: 16 bytes written and read for
    each number of a key. Half as many parts would not have filled the device, so fewer than 256
    keys and parts of keys come to a processor: at most 256 * 16 * H bytes, which its share of 4.8
    TB/s moves in 14 us at H = 128. (Of a group with few divisors, more.) One block of 128 x 128 of
    one query head takes 5.5 us at 400 TFLOP/s: a split costs what three blocks more would.

    Args:
      num_items: int, B * K * resident blocks: items without a split.
      rings: int, items of a program.
      group: int, query heads of a key head.
      processors: int, of the device.

    Returns:
      int, a divisor of the group; 1 leaves it whole.

    Example:
      >>> choose_parts(num_items=64, rings=1, group=4, processors=132)
      4
      >>> choose_parts(num_items=128, rings=1, group=4, processors=132)
      2
      >>> choose_parts(num_items=132, rings=1, group=4, processors=132)
      1
    """
    divisors = (parts for parts in range(1, group) if group % parts == 0)
    enough = (parts for parts in divisors if -(-num_items * parts // rings) >= processors)
    return next(enough, group)


def make_walk(
    problem: Problem,
    *,
    over_queries: bool,
    resident_bytes: int,
    streamed_bytes: int,
    max_tile: int,
    parts: int = 1,
) -> Walk:
    """Choose tile and ring sizes that fit in shared memory.

    Args:
      over_queries: bool, queries are resident and keys streamed, or the reverse.
      resident_bytes: int, of one row of a computing warpgroup, without what is staged.
      streamed_bytes: int, of one streamed position.
      max_tile: int, the widest tile that leaves registers enough.
      parts: int, into which the query heads of a key head are split; 1 if queries are resident.

    Raises:
      NotImplementedError: if not even two narrow tiles fit.
    """
    grain = problem.grain
    block, streamed_block = (
        (grain.block_q, grain.block_kv) if over_queries else (grain.block_kv, grain.block_q)
    )
    heads = problem.num_heads if over_queries else problem.num_kv_heads * parts
    mask_heads = 1 if problem.mask_heads == 1 else heads
    members = 1 if over_queries else problem.group // parts
    rings = NUM_COMPUTE if block == ROWS else 1
    for tile, resident_stages in itertools.product((128, 64), (2, 1)):
        staging_bytes = 0 if problem.in_registers else 2 * tile
        free = SHARED_MEMORY_BYTES - SPARE_BYTES
        free -= NUM_COMPUTE * ROWS * (resident_stages * resident_bytes + staging_bytes)
        stages = min(free // (rings * tile * streamed_bytes), _MAX_STAGES)
        if tile <= min(max_tile, streamed_block) and stages >= 2:
            return Walk(
                over_queries=over_queries,
                block=block,
                num_blocks=(problem.num_queries if over_queries else problem.num_keys) // block,
                heads=heads,
                mask_heads=mask_heads,
                parts=parts,
                members=members,
                tile=tile,
                pieces=streamed_block // tile,
                repeats=members if problem.mask_heads == 1 else 1,
                stages=stages,
                resident_stages=resident_stages,
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
      head: int32, of the `walk.heads`: each of the resident side as often as its group has parts.
      block: int32, resident block.
      count: int32, entries on the list; 0 if not valid.
      num_leading: int32, see `TileLists`.
      first: int32, steps that its ring takes before those of the list, in earlier rounds.
    """

    valid: jax.Array
    unit: jax.Array
    batch: jax.Array
    head: jax.Array
    block: jax.Array
    count: jax.Array
    num_leading: jax.Array
    first: jax.Array


def count_copies(problem: Problem, walk: Walk) -> int:
    """Return how often the lists of all masks are walked, for all examples and heads together."""
    return problem.batch // problem.mask_batch * (walk.heads // walk.mask_heads)


def count_rounds(problem: Problem, walk: Walk) -> int:
    """Return how many rounds all programs take together. A round takes `walk.rings` items."""
    return -(-problem.batch * walk.heads * walk.num_blocks // walk.rings)


def find_item(problem: Problem, walk: Walk, heads: Any, index: Any, first: Any) -> tuple[Item, Any]:
    """Find an item.

    Args:
      heads: reference to what `TileLists.list_heads` returned, in global memory.
      index: int32, which, in the order in which they are taken.
      first: int32, see `Item`.

    Returns:
      tuple of the item and int32, its first entry.
    """
    num_units = problem.mask_batch * walk.mask_heads * walk.num_blocks
    valid = index < num_units * count_copies(problem, walk)
    row = jnp.where(valid, index, 0)
    number, count, num_leading, entry = (heads[row, column] for column in range(4))
    copy, unit = lax.div(number, num_units), lax.rem(number, num_units)
    head_copies = walk.heads // walk.mask_heads
    mask, block = lax.div(unit, walk.num_blocks), lax.rem(unit, walk.num_blocks)
    item = Item(
        valid=valid,
        unit=unit,
        batch=lax.div(mask, walk.mask_heads) + lax.div(copy, head_copies),
        head=lax.rem(mask, walk.mask_heads) + lax.rem(copy, head_copies),
        block=block,
        count=jnp.where(valid, count, 0),
        num_leading=jnp.where(valid, num_leading, 0),
        first=first,
    )
    return item, entry


def locate(
    problem: Problem, walk: Walk, entries: Any, item: Item, step: Any, *, first_entry: Any = None
) -> tuple[Any, Any, Any]:
    """Find the tile of one step.

    Args:
      entries: reference to those of `TileLists`, in global memory.
      step: int32, of those of the item.
      first_entry: int32 that is known of step 0; None if it is to be read.

    Returns:
      tuple of int32, the streamed head, the first position of the tile, and the kept bits of its
      block.
    """
    position, piece = lax.div(step, walk.pieces), lax.rem(step, walk.pieces)
    member = jnp.int32(0)  # which query head of those of the item
    if walk.repeats > 1:
        # The leading entries of every head come before the others of any.
        leading = item.num_leading * walk.repeats
        in_leading = position < leading
        span = jnp.where(in_leading, item.num_leading, item.count - item.num_leading)
        span = jnp.maximum(span, 1)
        offset = jnp.where(in_leading, 0, item.num_leading)
        position = jnp.where(in_leading, position, position - leading)
        member = jnp.minimum(lax.div(position, span), walk.repeats - 1)
        position = offset + lax.rem(position, span)
    entry = entries[item.unit, position] if first_entry is None else first_entry
    index, bits = lax.div(entry, BITS), lax.rem(entry, BITS)
    if walk.over_queries:
        head = lax.div(item.head, problem.group)
    else:
        if walk.repeats < walk.members:
            # The lists of these heads are joined: see `make_key_lists`.
            num_blocks = problem.num_queries // problem.grain.block_q
            member, index = lax.div(index, num_blocks), lax.rem(index, num_blocks)
        head = item.head * walk.members + member
    return head, (index * walk.pieces + piece) * walk.tile, bits


def walk_list(
    problem: Problem,
    walk: Walk,
    ends: tuple[Any, Any, Any],
    step: Callable[..., Any],
    state: Any,
    *,
    first_step: Callable[..., Any] | None = None,
) -> Any:
    """Take all steps of a list, in one loop with a mask and one without, as far as needed.

    Args:
      ends: int32, the first step, that after the leading entries, and that after the last.
      step: function (int32, state, masked=bool) -> state.
      state: what the steps carry.
      first_step: as `step`, takes its place in the first step of the list.

    Returns:
      state after the last step.
    """
    first, middle, last = ends
    if not problem.all_masked and not problem.causal:
        # All entries are of the kind that needs no mask.
        middle = last if walk.over_queries else first
    for begin, end, leading in ((first, middle, True), (middle, last, False)):
        # Lists of query blocks begin with tiles that need no mask, lists of key blocks end so.
        masked = leading != walk.over_queries
        if not ((problem.all_masked or problem.causal) if masked else not problem.all_masked):
            continue
        if first_step is not None:
            take = functools.partial(first_step, masked=masked)
            state = lax.fori_loop(begin, jnp.minimum(end, first + 1), take, state)
            begin = jnp.maximum(begin, first + 1)
        state = lax.fori_loop(begin, end, functools.partial(step, masked=masked), state)
    return state
