"""Tiles of kernels, from static tables by compute capability: nothing is timed at the first call.

An op brings its tables. Neighbours in a family share instructions, so a device that is in no table
takes the row of the newest capability that is not above its own.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol


class Cut(Protocol):
    """What a launch asks of a tile, whatever else describes it."""

    @property
    def warps(self) -> int:
        """Of 32 threads, for each program."""
        ...

    @property
    def stages(self) -> int:
        """Tiles that are copied ahead, plus one."""
        ...


class Tile(NamedTuple):
    """How one kernel is cut.

    Attributes:
      rows: positions of a program that stay.
      columns: positions that a step of its loop covers.
      warps: of 32 threads, for each program.
      stages: tiles that are copied ahead, plus one.
    """

    rows: int
    columns: int
    warps: int
    stages: int

    def fit(self, rows: int, columns: int) -> "Tile":
        """Cut the tile to the blocks of a pattern.

        Fewer rows take fewer warps, but no less than four, or two of sixteen rows: what fewer would
        hold of a wide head does not fit in their registers.

        Args:
          rows: positions of a block along the side that stays, a power of two.
          columns: positions of a block along the other side, a power of two.

        Example:
          >>> Tile(64, 64, 8, 2).fit(32, 128)
          Tile(rows=32, columns=64, warps=4, stages=2)
        """
        fitted = min(self.rows, rows)
        least = min(self.warps, 4 if fitted > 16 else 2)
        warps = max(least, self.warps * fitted // self.rows)
        return Tile(fitted, min(self.columns, columns), warps, self.stages)

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns} {self.warps} warps {self.stages} stages"


def find_row[Row](table: Mapping[tuple[int, int], Row], capability: tuple[int, int]) -> Row:
    """Return the row of the newest capability that is not above a device's.

    Args:
      table: (major, minor) -> row; holds (8, 0).
      capability: (major, minor), of the device, at least (8, 0).

    Example:
      >>> find_row({(8, 0): "A100", (8, 6): "RTX 3090"}, (8, 7))
      'RTX 3090'
    """
    return table[max(key for key in table if key <= capability)]
