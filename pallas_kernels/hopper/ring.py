"""A ring of slots in shared memory that one warpgroup fills and others read.

The protocol is told in `pallas_kernels.hopper`. Steps are counted over the whole life of a program.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.launch import CLUSTER


def describe_ring(
    smem: Mapping[str, Any], *, copies: int, readers: int, cluster: int = 1
) -> tuple[Any, Any, Any]:
    """Describe the memory and the barriers of a ring.

    Args:
      smem: name -> scratch type [slots, ...], in the order in which they lie in memory.
      copies: int, that fill a slot.
      readers: int, warpgroups of a program that give a slot back.
      cluster: int, programs of a cluster; those of one share copies, see `Ring.shared`.

    Returns:
      tuple of scratch types, whose references are the first three of a `Ring`.
    """
    (slots,) = {memory.shape[0] for memory in smem.values()}
    return (
        # JAX would sort the names of a plain dict.
        collections.OrderedDict(smem),
        plgpu.Barrier(num_arrivals=copies, num_barriers=slots),
        _describe_free(slots, readers, cluster),
    )


def _describe_free(slots: int, readers: int, cluster: int) -> Any:
    if cluster == 1:
        return plgpu.Barrier(num_arrivals=readers, num_barriers=slots)
    # A reader arrives in every program of the cluster, each of which fills the slots of all.
    return plgpu.ClusterBarrier(
        collective_axes=(CLUSTER,), num_arrivals=readers, num_barriers=slots
    )


class Ring(NamedTuple):
    """Tiles that are copied, waited for and given back together.

    Attributes:
      smem: name -> reference [slots, ...].
      full: barriers, [slots]: the tiles are there.
      free: barriers, [slots]: the tiles have been used.
      stages: int, slots of this ring; there are more where several lie side by side.
      base: int or int32, the first slot of this ring.
      is_staggered: bool, each program begins with a slot of its own, not with the first; those of
        a cluster begin with the same.
      shared: names of the memory that has the same in all programs of a cluster. Each of them
        copies an equal part of a tile, to all: so they take the same steps in the same order.
    """

    smem: dict[str, Any]
    full: Any
    free: Any
    stages: int
    base: Any = 0
    is_staggered: bool = False
    shared: Sequence[str] = ()

    def beside(self, number: Any) -> "Ring":
        """Return one of several rings that lie side by side, of which this is the first.

        Args:
          number: int or int32, which.
        """
        return self._replace(base=number * self.stages)

    def find_slot(self, step: Any) -> Any:
        """Find the slot of a step.

        Args:
          step: int32.

        Returns:
          int32.
        """
        if self.is_staggered:
            step = lax.axis_index("program") + step
        return self.base + lax.rem(step, jnp.int32(self.stages))

    def next_slot(self, slot: Any) -> Any:
        """Find the slot of the step after that of a slot.

        Args:
          slot: int32.

        Returns:
          int32.
        """
        # Not a remainder, which costs registers.
        return jnp.where(slot == self.base + self.stages - 1, self.base, slot + 1)

    def previous_slot(self, slot: Any) -> Any:
        """Find the slot of the step before that of a slot.

        Args:
          slot: int32.

        Returns:
          int32.
        """
        return jnp.where(slot == self.base, self.base + self.stages - 1, slot - 1)

    def wait(self, slot: Any) -> dict[str, Any]:
        """Wait until a slot is full.

        Args:
          slot: int32, which.

        Returns:
          name -> reference [...].
        """
        plgpu.barrier_wait(self.full.at[slot])
        return self.look(slot)

    def look(self, slot: Any) -> dict[str, Any]:
        """Return a slot that has been waited for.

        Args:
          slot: int32, which.

        Returns:
          name -> reference [...].
        """
        return {name: ref.at[slot] for name, ref in self.smem.items()}

    def give_back(self, slot: Any) -> None:
        """Let a slot be filled again. Every reader does so.

        Args:
          slot: int32, which.
        """
        plgpu.barrier_arrive(self.free.at[slot])

    def claim(self, step: Any) -> Any:
        """Wait until the slot of a step may be filled.

        Args:
          step: int32.

        Returns:
          int32, the slot.
        """
        slot = self.find_slot(step)
        self.wait_until_free(slot, was_filled=step >= self.stages)
        return slot

    def wait_until_free(self, slot: Any, *, was_filled: Any) -> None:
        """Wait until a slot is free.

        Args:
          slot: int32, which.
          was_filled: bool, False if there is nothing to wait for.
        """

        @pl.when(was_filled)
        def _():
            plgpu.barrier_wait(self.free.at[slot])

    def copy(self, tile: Any, name: str, slot: Any, *place: Any) -> None:
        """Start a copy into a slot.

        Args:
          tile: reference to global memory.
          name: of the memory.
          slot: int32, which.
          *place: indices of the slot, none where the tile fills it.
        """
        plgpu.copy_gmem_to_smem(
            tile,
            self.smem[name].at[(slot, *place)],
            self.full.at[slot],
            collective_axes=CLUSTER if name in self.shared else None,
        )

    def put(self, slot: Any, **numbers: Any) -> None:
        """Put numbers into a slot that is free; they count as one of the copies that fill it.

        Args:
          slot: int32, which.
          **numbers: name of the memory, [slots] -> int32.
        """
        for name, number in numbers.items():
            self.smem[name][slot] = number
        plgpu.barrier_arrive(self.full.at[slot])

    def read(self, slot: Any, name: str) -> Any:
        """Read a number of a slot that has been waited for.

        Args:
          slot: int32, which.
          name: of the memory, [slots].

        Returns:
          int32.
        """
        return self.smem[name][slot]

    def announce(self, step: Any, **numbers: Any) -> None:
        """Hand over the numbers of a step, when its slot is free.

        Args:
          step: int32.
          **numbers: name of the memory, [slots] -> int32.
        """
        self.put(self.claim(step), **numbers)

    def hear(self, step: Any, *names: str) -> tuple[Any, ...]:
        """Wait for the numbers that are announced for a step, and give its slot back.

        Args:
          step: int32.
          *names: of the memory, [slots].

        Returns:
          tuple of int32.
        """
        slot = self.find_slot(step)
        plgpu.barrier_wait(self.full.at[slot])
        numbers = tuple(self.read(slot, name) for name in names)
        self.give_back(slot)
        return numbers

    def drain(self, steps: Any) -> None:
        """Wait until all slots are free, so that no arrival is left that nobody has waited for.

        Args:
          steps: int32, how many there were.
        """

        def wait(step, _):
            plgpu.barrier_wait(self.free.at[self.find_slot(step)])

        lax.fori_loop(jnp.maximum(steps - self.stages, 0), steps, wait, None)
