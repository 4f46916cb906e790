"""What a backend of `transposable_mask` is given.

Letters: K rows and N columns of a weight, the rows of all layers one below the other.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax

TILE = 4
"""Rows and columns of a tile."""


class TransposableArrays(NamedTuple):
    """Arrays of one call.

    Attributes:
      w: float[K, N], K and N multiples of 4.
    """

    w: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransposableFacts:
    """Static facts of one call.

    Attributes:
      rows: int, K, of all layers together.
      columns: int, N.
      dtype: str, of w.
    """

    rows: int
    columns: int
    dtype: str

    DIRECTIONS: ClassVar[tuple[str, ...]] = ("forward",)

    @property
    def kernel_options(self) -> dict[str, str | int | bool]:
        """What a kernel is compiled for, sizes aside."""
        return {"dtype": self.dtype}

    @property
    def sizes(self) -> tuple[int, ...]:
        """(K, N)."""
        return self.rows, self.columns

    @property
    def num_tiles(self) -> int:
        """Tiles of 4 x 4."""
        return (self.rows // TILE) * (self.columns // TILE)
