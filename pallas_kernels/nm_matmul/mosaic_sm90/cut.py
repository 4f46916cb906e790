"""How the Hopper kernel cuts a product: what of the operands and of the result belongs to a tile.

Letters: R rows, C columns of the sparse operand, P columns of the dense one.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu

from pallas_kernels.hopper.budget import NUM_COMPUTE, SPARE_BYTES
from pallas_kernels.nm_matmul.packing import TILE

STORE_SLOTS = 2
"""Parts of a tile of the result that a warpgroup has in shared memory on their way out."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
      blocks: int, 1 or 2, blocks of 64 rows that each computing warpgroup holds.
      columns: int, columns of the dense operand in a tile: a multiple of 32, at most 256, or 192
        with two blocks.
      contraction: int, 64 or 128, how much of C a step takes.
      stages: int, steps that the ring holds.
      cluster: int, programs that take tiles of R below one another, and share what they read of the
        dense operand.
      group: int, tiles of P that are taken together before the next tiles of R, for the cache.
      in_flight: int, 0 or 1, steps whose instructions may run on while the next is started. With 0
        every step waits for its own, which is expected to be slower and leaves least to go wrong.

    Raises:
      ValueError: if `in_flight` is neither, or the ring has no slot beside those in flight.
    """

    blocks: int
    columns: int
    contraction: int
    stages: int
    cluster: int = 1
    group: int = 8
    in_flight: int = 1

    def __post_init__(self):
        if self.in_flight not in (0, 1) or self.stages <= self.in_flight:
            raise ValueError(
                "in_flight must be 0 or 1 and smaller than stages, "
                f"got in_flight={self.in_flight}, stages={self.stages}"
            )

    @property
    def rows(self) -> int:
        """Rows of the sparse operand in a tile."""
        return NUM_COMPUTE * self.blocks * TILE

    @property
    def store_columns(self) -> int:
        """Columns of a tile that are stored together."""
        return TILE if self.columns % TILE == 0 else TILE // 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Static facts of one product.

    Attributes:
      rows: int, R.
      contraction: int, C.
      columns: int, P, at least those of a tile. Copies fill up what a last tile lacks with zeros,
        and leave it out of the result.
      dtype: str, of operands and result.
      dense_is_transposed: bool, B is given as [P, C], not [C, P].
      has_bias: bool, a bias is added to each row of A, a column of the result.
      activation: str or None; of a gated one, R holds values and then gates, and the result has
        R/2 columns.
      keeps_inputs: bool, what the activation was applied to is returned as well.
    """

    rows: int
    contraction: int
    columns: int
    dtype: str
    dense_is_transposed: bool
    has_bias: bool = False
    activation: str | None = None
    keeps_inputs: bool = False

    @property
    def is_gated(self) -> bool:
        """Whether half of the rows gate the other half."""
        return self.activation in ("geglu", "swiglu")

    @property
    def out_columns(self) -> int:
        """Columns of the result."""
        return self.rows // 2 if self.is_gated else self.rows


class Place(NamedTuple):
    """Where a tile begins, int32.

    Attributes:
      row: of the sparse operand, a column of the result.
      column: of the dense operand, a row of the result.
    """

    row: Any
    column: Any


@dataclasses.dataclass(frozen=True)
class Cut:
    """A product and how it is cut."""

    problem: Problem
    tiles: Tiles

    @property
    def num_steps(self) -> int:
        """Steps of a tile."""
        return self.problem.contraction // self.tiles.contraction

    @property
    def stride(self) -> int:
        """Rows from one block of a warpgroup to its next.

        Rows of one block of both warpgroups lie together; those of a gate half of R further on.
        """
        return self.problem.rows // 2 if self.problem.is_gated else NUM_COMPUTE * TILE

    @property
    def grid(self) -> tuple[int, int]:
        """Along R and along P, tiles that the programs of a cluster take together."""
        return (
            pl.cdiv(self.problem.out_columns, self.tiles.cluster * self._rows_of_tile),
            pl.cdiv(self.problem.columns, self.tiles.columns),
        )

    @property
    def num_tiles(self) -> int:
        """Tiles of the result, those past its end included that fill up a cluster."""
        return self.tiles.cluster * self.num_shared_tiles

    @property
    def num_shared_tiles(self) -> int:
        """Tiles that the programs of a cluster take together."""
        rows, columns = self.grid
        return rows * columns

    @property
    def chunk(self) -> int:
        """Rows that are copied together.

        A tile that reaches over the end is copied in halves, each from where there is something.
        """
        rows = NUM_COMPUTE * TILE
        return rows if self.stride % rows == 0 == self.problem.rows % rows else TILE

    @property
    def num_chunks(self) -> int:
        """Copies of rows in a step."""
        return self.tiles.rows // self.chunk

    @property
    def most_stores(self) -> int:
        """Stores of a warpgroup that may be on their way while it writes the next part.

        Waits count what was stored. In a last tile only some of the blocks may be.
        """
        problem, tiles = self.problem, self.tiles
        all_or_none = problem.is_gated or tiles.blocks == 1 or problem.rows % tiles.rows == 0
        return STORE_SLOTS - 1 if all_or_none else 0

    @property
    def _rows_of_tile(self):
        return self.tiles.rows // 2 if self.problem.is_gated else self.tiles.rows

    def locate(self, tile: Any, rank: Any) -> Place:
        """Find a tile.

        Args:
          tile: int32, number of those that a cluster takes together.
          rank: int32, of the program in its cluster.
        """
        row, column = plgpu.planar_snake(tile, self.grid, 1, self.tiles.group)
        row = row * self.tiles.cluster + rank
        return Place(row * self._rows_of_tile, column * self.tiles.columns)


def count_shared_bytes(problem: Problem, tiles: Tiles) -> int:
    """Return the shared memory that a program takes."""
    values = tiles.rows * tiles.contraction
    metadata = tiles.rows * tiles.contraction // 8
    dense = 2 * tiles.columns * tiles.contraction
    stores = 2 * NUM_COMPUTE * STORE_SLOTS * tiles.store_columns * TILE
    bias = 2 * tiles.rows * problem.has_bias
    return tiles.stages * (values + metadata + dense) + stores + bias + SPARE_BYTES
