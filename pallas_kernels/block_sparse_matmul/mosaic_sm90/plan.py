"""What differs between the products: which tiles a step reads, and how warpgroups share them."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.budget import NUM_COMPUTE, ROWS, SHARED_MEMORY_BYTES, SPARE_BYTES

TILE = ROWS
"""How much of the contraction a step takes. All tiles are as long, or twice as long."""

_MAX_STAGES = 6

type Start = tuple[Any, Any]
"""Row and column, int or int32, where a tile begins."""


class Lists(NamedTuple):
    """Lists in the order in which they are started.

    Attributes:
      owners: int32[U], which block of the result a list is for.
      counts: int32[U], entries of each list.
      entries: int32[U, P], or None where the entry at a position is the position.
      others: int32[U], a second block of the result that the list is for, -1 where there is none;
        None where a tile has one block. With it an owner may be -1: of another list, `others`.
    """

    owners: jax.Array
    counts: jax.Array
    entries: jax.Array | None
    others: jax.Array | None = None


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
      num_row_tiles: int, tiles that share a list, a multiple of `cluster`.
      group: int, of these, how many are taken before the next list, for the cache; likewise.
      blocks: int, 1 or 2, of the result that a tile may have. They share the left operand.
      cluster: int, programs that take row tiles below one another, and share what they read of the
        right operand.
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
    blocks: int = 1
    cluster: int = 1

    @property
    def step_bytes(self) -> int:
        """Bytes that a step copies, of two blocks where a tile may have them."""
        return self.lhs.num_bytes + self.blocks * self.rhs.num_bytes

    def count_shared_tiles(self, num_lists: int) -> int:
        """Count the tiles that the programs of a cluster take together."""
        return num_lists * self.num_row_tiles // self.cluster

    def locate(self, tile: Any, num_lists: int, rank: Any) -> tuple[Any, Any]:
        """Find a tile: all lists, longest first, for one group of row tiles after the other.

        Args:
          tile: int32, number of those that a cluster takes together.
          rank: int32, of the program in its cluster.

        Returns:
          tuple of int32, row tile and list.
        """
        group = self.group // self.cluster
        in_group = group * num_lists
        first = lax.div(tile, in_group) * group
        size = jnp.minimum(self.num_row_tiles // self.cluster - first, group)
        place = lax.rem(tile, in_group)
        return (first + lax.rem(place, size)) * self.cluster + rank, lax.div(place, size)


def count_stages(plan: Plan) -> int:
    """Return how many steps the ring of a program holds.

    Returns:
      int, at most 6.
    """
    rows, columns = plan.shape
    fixed = NUM_COMPUTE * (2 * rows * columns + 2 * columns)
    if plan.is_split:
        fixed += 4 * rows * columns
    free = SHARED_MEMORY_BYTES - SPARE_BYTES - fixed
    return min(free // plan.step_bytes, _MAX_STAGES)
