"""A program of the Hopper attention kernels: whose lists it walks, and what lies where.

Two warpgroups compute and one copies, as told in `pallas_kernels.hopper`. What stays while a list
is walked (64 rows for each computing warpgroup) is called resident, what is copied tile by tile is
called streamed.

*Rings.* A list belongs to one block of the resident side. Where that block has 128 rows, the two
computing warpgroups take 64 each and share one ring of streamed tiles. Where it has 64 rows, each
has a list and a ring of its own, so that one computes exponentials while the other keeps the tensor
cores busy. The copying warpgroup fills both in turns, and waits for a free slot of the first before
it turns to the second: the one that is ahead waits once it has used up its ring.

*Rounds.* There are as many programs as the GPU has processors, and in each round a program takes
one list, or two. The copying warpgroup finds them, announces them and goes on to the next: it reads
what they are from global memory, which is slow to answer, and copies their tiles, while those of
the last round are still computed and written. Where there is no room for the resident tiles of a
second round, each program takes one.

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

from pallas_kernels.block_sparse_attention.mosaic_sm90.share import Share, select
from pallas_kernels.block_sparse_attention.mosaic_sm90.tile_lists import TileLists
from pallas_kernels.block_sparse_attention.mosaic_sm90.walk import (
    Item,
    Problem,
    Walk,
    count_rounds,
    find_item,
    locate,
)
from pallas_kernels.dispatch import count_processors
from pallas_kernels.hopper.budget import NUM_COMPUTE, ROWS
from pallas_kernels.hopper.launch import for_each_tile, launch_kernel
from pallas_kernels.hopper.ring import Ring, describe_ring
from pallas_kernels.hopper.shared_memory import matrix_smem
from pallas_kernels.hopper.turns import Turns, describe_turns

# What the copying warpgroup tells a computing one of its list, besides its tiles.
_NUMBERS = (*Item._fields, "common")


class _Scratch(NamedTuple):
    """Shared memory: scratch types, and in the kernel references.

    Attributes:
      resident: see `describe_ring`; for each computing warpgroup, what stays while a list is
        walked: tiles, [slots, 64, ...], and numbers, int32[slots].
      own: name -> [2, ...], other memory of each computing warpgroup.
      rings: see `describe_ring`; one for each group of streamed arrays.
      turns: see `describe_turns`; None if there are no turns.
    """

    resident: Any
    own: dict[str, Any]
    rings: list[Any]
    turns: Any


class _Program(NamedTuple):
    """What the warpgroups of a program share.

    Attributes:
      heads: reference to what `TileLists.list_heads` returned, in global memory.
      entries: reference to those of `TileLists`.
      gmem: name -> reference to global memory.
      own: name -> reference [2, ...], memory of each computing warpgroup.
      resident: the first warpgroup's Ring of what stays while a list is walked.
      rings: the first Ring for each group of streamed arrays, in the order in which a step uses
        them.
      turns: barriers of `Turns`, or None.
      num_programs: int, that share the rounds.
    """

    problem: Problem
    walk: Walk
    heads: Any
    entries: Any
    gmem: dict[str, Any]
    own: dict[str, Any]
    resident: Ring
    rings: Sequence[Ring]
    turns: Any
    num_programs: int

    def for_each_round(self, body: Callable[[Any, Any], Any], state: Any) -> Any:
        """Run a body on the rounds of this program."""
        num_rounds = count_rounds(self.problem, self.walk)
        return for_each_tile(body, state, num_tiles=num_rounds, num_programs=self.num_programs)

    def find_start(self, item: Item, warpgroup: Any) -> Any:
        """Find the position of a warpgroup's first row."""
        start = item.block * self.walk.block
        return start if self.walk.rings == NUM_COMPUTE else start + warpgroup * ROWS


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
    in_turns: bool = False,
    name: str,
) -> Any:
    """Run a kernel: fill the rings, and let two warpgroups of each program compute.

    Args:
      compute: function (Share, *outputs), run by each computing warpgroup for each of its lists;
        outputs are references to global memory.
      operands: name -> array, None where there is none.
      lists: TileLists to walk.
      resident: names of operands that stay in shared memory.
      streamed: names of operands, by Ring, in the order in which a step uses them.
      out_type: what the kernel returns.
      scratch: name -> scratch type [2, ...], other shared memory of the computing warpgroups.
      in_turns: bool, each step is a turn of its warpgroup.
      name: str, of the kernel.

    Returns:
      list of arrays.
    """
    operands = {key: array for key, array in operands.items() if array is not None}
    resident = [key for key in resident if key in operands]
    streamed = [[key for key in keys if key in operands] for keys in streamed]
    num_programs = count_rounds(problem, walk)
    if walk.stays:
        num_programs = min(num_programs, count_processors())

    def make_program(inputs, outputs, scratch):
        gmem, heads, entries = inputs
        program = _Program(
            problem,
            walk,
            heads,
            entries,
            gmem,
            scratch.own,
            resident=Ring(*scratch.resident, stages=walk.resident_stages),
            rings=[Ring(*ring, stages=walk.stages) for ring in scratch.rings],
            turns=scratch.turns,
            num_programs=num_programs,
        )

        def compute_rounds(warpgroup):
            _compute(program, warpgroup, lambda share: compute(share, *outputs))

        return lambda: _copy(program), compute_rounds

    kernel_scratch = _describe_scratch(problem, walk, operands, resident, streamed, scratch or {})
    return launch_kernel(
        make_program,
        (operands, lists.list_heads(), lists.entries),
        out_type=list(out_type),
        scratch=kernel_scratch._replace(turns=describe_turns() if in_turns else None),
        num_programs=num_programs,
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
    num_resident = NUM_COMPUTE * walk.resident_stages
    return _Scratch(
        resident=describe_ring(
            tile_smem(resident, num_resident, ROWS)
            | dict.fromkeys(_NUMBERS, plgpu.SMEM((num_resident,), jnp.int32)),
            copies=len(resident) + 1,
            readers=1,
        ),
        own={**own} if problem.in_registers else {**own, "staging": staging},
        rings=[
            describe_ring(tile_smem(keys, walk.slots, walk.tile), copies=len(keys), readers=readers)
            for keys in streamed
        ],
        turns=None,
    )


def _copy(program: _Program) -> None:
    """Find the lists of all rounds of a program, announce them, and copy their tiles."""
    problem, walk = program.problem, program.walk

    def copy_round(number, state):
        count, used = state
        found = [
            find_item(problem, walk, program.heads, number * walk.rings + ring, first)
            for ring, first in enumerate(used)
        ]
        items = [item for item, _ in found]
        for warpgroup in range(NUM_COMPUTE):
            _copy_resident(program, items, warpgroup, count)
        _copy_lists(program, found)
        steps = (item.count * walk.steps_per_entry for item in items)
        return count + 1, tuple(map(jnp.add, used, steps))

    start = jnp.int32(0), (jnp.int32(0),) * walk.rings
    count, used = program.for_each_round(copy_round, start)
    for warpgroup in range(NUM_COMPUTE):
        program.resident.beside(warpgroup).drain(count)
    for number, steps in enumerate(used):
        for ring in program.rings:
            ring.beside(number).drain(steps)


def _copy_resident(program: _Program, items: Sequence[Item], warpgroup: int, count: Any) -> None:
    """Tell a warpgroup what its list is and copy what stays, after `count` rounds."""
    ring, walk = program.resident.beside(warpgroup), program.walk
    item = items[warpgroup % walk.rings]
    slot = ring.claim(count)
    common = functools.reduce(jnp.minimum, [each.count for each in items]) * walk.steps_per_entry
    numbers = item._replace(valid=item.valid.astype(jnp.int32))._asdict()
    ring.put(slot, common=item.first + common, **numbers)
    start = program.find_start(item, warpgroup)
    head = item.head if walk.parts == 1 else lax.div(item.head, jnp.int32(walk.parts))
    for name in ring.smem:
        if name not in _NUMBERS:
            ring.copy(select(program.gmem[name], item, head, start, ROWS), name, slot)


def _copy_lists(program: _Program, found: Sequence[tuple[Item, Any]]) -> None:
    """Copy all tiles of the items of a round into their rings, as fast as they are used.

    Args:
      found: items, each with its first entry.
    """
    walk = program.walk
    items = [item for item, _ in found]
    num_steps = [item.count * walk.steps_per_entry for item in items]

    def find_tile(item, step, first_entry=None):
        head, start, _ = locate(
            program.problem, walk, program.entries, item, step, first_entry=first_entry
        )
        return head, start

    def copy_step(step, upcoming):
        following = []
        for number, (item, steps, (head, start)) in enumerate(
            zip(items, num_steps, upcoming, strict=True)
        ):

            @pl.when(step < steps)
            def _(number=number, item=item, head=head, start=start):
                for ring in program.rings:
                    own = ring.beside(number)
                    slot = own.claim(item.first + step)
                    for name in own.smem:
                        tile = select(program.gmem[name], item, head, start, walk.tile)
                        own.copy(tile, name, slot)

            # Read now what the next step needs: global memory is slow to answer.
            following.append(find_tile(item, jnp.minimum(step + 1, jnp.maximum(steps - 1, 0))))
        return tuple(following)

    longest = functools.reduce(jnp.maximum, num_steps)
    first = tuple(find_tile(item, jnp.int32(0), entry) for item, entry in found)
    lax.fori_loop(0, longest, copy_step, first)


def _compute(program: _Program, warpgroup: Any, compute: Callable[[Share], None]) -> None:
    """Compute a warpgroup's part of all rounds of a program."""
    resident = program.resident.beside(warpgroup)

    def give_back_last(count):
        # Results are written from there.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        resident.give_back(resident.find_slot(count - 1))

    def compute_round(_, count):
        slot = resident.find_slot(count)
        resident.wait(slot)
        pl.when(count > 0)(lambda: give_back_last(count))
        compute(_take_share(program, warpgroup, slot))
        return count + 1

    turns = Turns(program.turns, warpgroup)
    turns.begin()
    give_back_last(program.for_each_round(compute_round, jnp.int32(0)))
    turns.end()


def _take_share(program: _Program, warpgroup: Any, slot: Any) -> Share:
    """Collect what a warpgroup works on in a round, from a slot of what stays."""
    walk, resident = program.walk, program.resident.beside(warpgroup)
    number = warpgroup if walk.rings == NUM_COMPUTE else 0

    def find():
        numbers = {name: resident.read(slot, name) for name in Item._fields}
        item = Item(**numbers | {"valid": numbers["valid"] != 0})
        return item, program.find_start(item, warpgroup)

    item, _ = find()
    # Lists of one ring are one list.
    common = resident.read(slot, "common") if walk.rings == NUM_COMPUTE else None
    own = {name: ref.at[warpgroup] for name, ref in program.own.items()}
    return Share(
        problem=program.problem,
        walk=walk,
        entries=program.entries,
        find=find,
        smem=resident.look(slot) | own,
        rings=[ring.beside(number) for ring in program.rings],
        turns=Turns(program.turns, warpgroup, common),
        first=item.first,
        end=item.first + item.count * walk.steps_per_entry,
    )
