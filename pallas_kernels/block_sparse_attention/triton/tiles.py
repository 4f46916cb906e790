"""Tiles of the attention kernels by compute capability, dtype and head dim.

They were chosen so that no kernel spills a register and shared memory fits
(`benchmarks/results/compiled_kernels.md`). None was timed.
"""

from typing import NamedTuple

from pallas_kernels.triton.tile_tables import Tile, find_row


class Tiles(NamedTuple):
    """Tiles of the three kernels, before they are cut to the blocks of a pattern.

    Attributes:
      forward: queries stay, keys come by.
      queries: the kernel of dQ; queries stay, keys come by.
      keys: the kernel of dK and dV; keys stay, queries come by.
    """

    forward: Tile
    queries: Tile
    keys: Tile

    def fit(self, block_q: int, block_kv: int) -> "Tiles":
        """Cut all to the blocks of a pattern.

        Args:
          block_q: int, queries of a block.
          block_kv: int, keys of a block.
        """
        return Tiles(
            self.forward.fit(block_q, block_kv),
            self.queries.fit(block_q, block_kv),
            self.keys.fit(block_kv, block_q),
        )


# Without tensor cores products take more registers, and the kernel with two sums more warps.
_FLOAT32 = Tiles(Tile(16, 16, 4, 2), Tile(16, 16, 4, 2), Tile(16, 16, 8, 2))

# Bytes of an element and head dim, padded -> tiles.
_AMPERE = {
    (2, 64): Tiles(Tile(64, 64, 4, 3), Tile(64, 32, 4, 3), Tile(64, 32, 4, 2)),
    (2, 128): Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 8, 2)),
    (2, 256): Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 4, 2), Tile(32, 32, 8, 1)),
    (4, 64): _FLOAT32,
    (4, 128): _FLOAT32,
}
# Here 64 rows of a wide head spill with eight warps, and dK and dV of 64 keys with four.
_BLACKWELL = _AMPERE | {
    (2, 64): Tiles(Tile(64, 64, 4, 3), Tile(64, 32, 4, 3), Tile(64, 32, 8, 2)),
    (2, 256): Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 8, 1)),
}
_TABLE = {
    (8, 0): _AMPERE,
    (8, 6): _AMPERE,
    (8, 9): _AMPERE,
    (9, 0): _AMPERE,
    (10, 0): _BLACKWELL,
    (12, 0): _AMPERE,
}
CAPABILITIES = tuple(_TABLE)


def find_tiles(
    capability: tuple[int, int],
    itemsize: int,
    padded_head_dim: int,
    *,
    block_q: int,
    block_kv: int,
    all_masked: bool,
) -> Tiles:
    """Return the tiles of a call.

    Args:
      capability: (major, minor), at least (8, 0).
      itemsize: int, bytes of an element: 2 or 4.
      padded_head_dim: int, a power of two from 16 to 256.
      block_q: int, queries of a block.
      block_kv: int, keys of a block.
      all_masked: bool, whether every tile has a mask, whose registers a wide tile lacks.

    Raises:
      NotImplementedError: if no tile of the head dim fits.
    """
    row = find_row(_TABLE, capability)
    key = itemsize, max(padded_head_dim, 64)
    if key not in row:
        raise NotImplementedError(
            "the Triton kernels take float32 with head dims up to 128: tiles of wider ones fit in "
            "no registers"
        )
    tiles = row[key].fit(block_q, block_kv)
    if all_masked:
        forward = tiles.forward
        tiles = tiles._replace(forward=forward._replace(columns=min(forward.columns, 32)))
    return tiles
