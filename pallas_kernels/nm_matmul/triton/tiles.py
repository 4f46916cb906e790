"""Tiles of the packing and the pruning kernel by compute capability.

They were chosen so that a thread moves 16 bytes at a time where arrays allow it, and no register
spills (`benchmarks/results/compiled_kernels.md`). None was timed.
"""

from typing import NamedTuple

from pallas_kernels.nm_matmul.packing import TILE
from pallas_kernels.triton.tile_tables import Tile, find_row


class Tiles(NamedTuple):
    """Tiles of one device.

    Attributes:
      pack: of a weight, 64 x 64 everywhere, whose metadata are whole words along either axis.
      prune: bytes of an entry -> groups in all.
    """

    pack: Tile
    prune: dict[int, int]


_WARPS = 4
# Eight entries of two bytes, or four of four, of each row of groups for each of 128 threads.
_AMPERE = Tiles(Tile(TILE, TILE, _WARPS, 1), {2: 1024, 4: 512})
_TABLE = {
    (8, 0): _AMPERE,
    (8, 6): _AMPERE,
    (8, 9): _AMPERE,
    (9, 0): _AMPERE,
    (10, 0): _AMPERE,
    (12, 0): _AMPERE,
}
CAPABILITIES = tuple(_TABLE)


def find_pack_tile(capability: tuple[int, int]) -> Tile:
    """Return the tile of a weight that a program packs.

    Args:
      capability: (major, minor), at least (8, 0).
    """
    return find_row(_TABLE, capability).pack


def find_prune_tile(capability: tuple[int, int], itemsize: int, behind: int) -> Tile:
    """Return the tile of groups that a program prunes.

    Args:
      capability: (major, minor), at least (8, 0).
      itemsize: int, bytes of an entry: 2 or 4.
      behind: int, entries behind the axis of the groups; 1 where that is the last.

    Returns:
      Tile: rows of groups, and columns behind the axis, powers of two.

    Example:
      >>> find_prune_tile((8, 0), 2, 100)
      Tile(rows=8, columns=128, warps=4, stages=1)
    """
    groups = find_row(_TABLE, capability).prune[itemsize]
    columns = min(groups, 1 << (behind - 1).bit_length())
    return Tile(groups // columns, columns, _WARPS, 1)
