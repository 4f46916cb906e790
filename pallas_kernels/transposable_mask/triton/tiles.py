"""Weights of a program by compute capability; none was timed.

A lane holds one tile of 4 x 4, which takes 40 to 50 registers.
"""

from pallas_kernels.triton.tile_tables import Tile, find_row

_ONE_TILE_A_LANE = Tile(4, 512, 4, 1)
_TABLE = {
    (8, 0): _ONE_TILE_A_LANE,
    (8, 6): _ONE_TILE_A_LANE,
    (8, 9): _ONE_TILE_A_LANE,
    (9, 0): _ONE_TILE_A_LANE,
    (10, 0): _ONE_TILE_A_LANE,
    (12, 0): _ONE_TILE_A_LANE,
}
CAPABILITIES = tuple(_TABLE)


def find_tile(capability: tuple[int, int]) -> Tile:
    """Return how many rows and columns of the weight a program searches.

    Args:
      capability: (major, minor), at least (8, 0).
    """
    return find_row(_TABLE, capability)
