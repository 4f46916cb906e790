"""Tiles of the kernels of the mean map by compute capability, dtype and head dim.

They were chosen so that no kernel spills a register and shared memory fits
(`benchmarks/results/compiled_kernels.md`). None was timed.
"""

from typing import NamedTuple

from pallas_kernels.triton.tile_tables import Tile, find_row


class Tiles(NamedTuple):
    """Tiles of the two kernels.

    Attributes:
      mean: queries and keys of the result; both stay, examples and heads come by.
      lse: queries stay, keys come by.
    """

    mean: Tile
    lse: Tile


# Without tensor cores products take more registers.
_FLOAT32 = {
    (4, 64): Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    (4, 128): Tiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    (4, 256): Tiles(Tile(32, 16, 8, 2), Tile(32, 32, 8, 2)),
}
# Bytes of an element and head dim, padded -> tiles. A block may have 163 KB of shared memory or
# more.
_WIDE = _FLOAT32 | {
    (2, 64): Tiles(Tile(128, 128, 8, 3), Tile(128, 64, 8, 3)),
    (2, 128): Tiles(Tile(128, 128, 8, 3), Tile(128, 64, 8, 3)),
    (2, 256): Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
}
# Here wider tiles leave no register for masks and edges.
_AMPERE = _WIDE | {
    (2, 128): Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
    (2, 256): Tiles(Tile(64, 64, 8, 2), Tile(64, 64, 4, 2)),
}
# Or 99 KB.
_NARROW = _WIDE | {
    (2, 128): Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 4, 3)),
    (2, 256): Tiles(Tile(64, 64, 8, 2), Tile(64, 32, 8, 2)),
}
_TABLE = {
    (8, 0): _AMPERE,
    (8, 6): _NARROW,
    (8, 9): _NARROW,
    (9, 0): _WIDE,
    (10, 0): _WIDE,
    (12, 0): _NARROW,
}
CAPABILITIES = tuple(_TABLE)


def find_tiles(capability: tuple[int, int], itemsize: int, padded_head_dim: int) -> Tiles:
    """Return the tiles of a call.

    Args:
      capability: (major, minor), at least (8, 0).
      itemsize: int, bytes of an element: 2 or 4.
      padded_head_dim: int, a power of two from 16 to 256.
    """
    return find_row(_TABLE, capability)[itemsize, max(padded_head_dim, 64)]
