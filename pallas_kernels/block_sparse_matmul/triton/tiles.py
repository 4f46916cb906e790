"""Tiles of the products by compute capability and dtype.

They were chosen so that no kernel spills a register and shared memory fits
(`benchmarks/results/compiled_kernels.md`). None was timed.
"""

import math
from typing import NamedTuple

from pallas_kernels.triton.tile_tables import find_row


class ProductTile(NamedTuple):
    """How a kernel that multiplies is cut.

    Attributes:
      rows: of the result, of one program.
      columns: of the result, of one program.
      depth: of the contraction, that one step of its loop takes.
      warps: of 32 threads, for each program.
      stages: steps that are copied ahead, plus one.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def fit(self, rows: int, columns: int, depth: int) -> "ProductTile":
        """Cut the tile to sizes of a call: its sides become the largest common divisors.

        Example:
          >>> ProductTile(128, 128, 64, 8, 3).fit(128, 96, 48)
          ProductTile(rows=128, columns=32, depth=16, warps=4, stages=3)
        """
        rows, columns = math.gcd(self.rows, rows), math.gcd(self.columns, columns)
        # Half of the warps would hold a tile of half the size as well.
        is_smaller = rows * columns < self.rows * self.columns
        warps = min(self.warps, 4) if is_smaller else self.warps
        return ProductTile(rows, columns, math.gcd(self.depth, depth), warps, self.stages)

    def __str__(self) -> str:
        cut = f"{self.rows}x{self.columns}x{self.depth}"
        return f"{cut} {self.warps} warps {self.stages} stages"


class Tiles(NamedTuple):
    """Tiles of the three products.

    Attributes:
      forward: y, tokens by columns; a step takes rows of the weight.
      transposed: dx, tokens by rows of the weight; a step takes its columns.
      gradient: dw, rows by columns of the weight; a step takes tokens.
    """

    forward: ProductTile
    transposed: ProductTile
    gradient: ProductTile


_ROWS = ProductTile(128, 128, 32, 8, 4)
_GRADIENT = ProductTile(64, 128, 32, 4, 4)
# Without tensor cores products take more registers.
_FLOAT32_ROWS = ProductTile(64, 64, 16, 8, 3)
_FLOAT32 = Tiles(_FLOAT32_ROWS, _FLOAT32_ROWS, _FLOAT32_ROWS)
# Bytes of an element -> tiles.
_AMPERE = {2: Tiles(_ROWS, _ROWS, _GRADIENT), 4: _FLOAT32}
# One instruction reads 64 positions of the contraction from shared memory, and there is more of it.
_DEEP_ROWS = ProductTile(128, 128, 64, 8, 4)
_HOPPER = _AMPERE | {2: Tiles(_DEEP_ROWS, _DEEP_ROWS, ProductTile(64, 128, 64, 4, 4))}
_TABLE = {
    (8, 0): _AMPERE,
    (8, 6): _AMPERE,
    (8, 9): _AMPERE,
    (9, 0): _HOPPER,
    (10, 0): _HOPPER,
    (12, 0): _AMPERE,
}
CAPABILITIES = tuple(_TABLE)


def find_tiles(
    capability: tuple[int, int], itemsize: int, *, tokens: int, block: tuple[int, int]
) -> Tiles:
    """Return the tiles of a call.

    Args:
      capability: (major, minor), at least (8, 0).
      itemsize: int, bytes of an element: 2 or 4.
      tokens: int, M.
      block: (rows, columns) of a block of the weight, multiples of 16.
    """
    rows, columns = block
    forward, transposed, gradient = find_row(_TABLE, capability)[itemsize]
    return Tiles(
        _cut_tokens(forward, tokens, columns, rows),
        _cut_tokens(transposed, tokens, rows, columns),
        gradient.fit(rows, columns, gradient.depth),
    )


def _cut_tokens(cut: ProductTile, tokens: int, columns: int, depth: int) -> ProductTile:
    # Not of more rows than there are tokens, filled up to a power of two.
    tall = max(16, 1 << (tokens - 1).bit_length())
    if columns % 32:
        # Tiles of 128 rows and 16 columns spill on an A100.
        tall = min(tall, 64)
    return cut.fit(tall, columns, depth)
