"""Tiles of the kernels by compute capability.

They were chosen so that a thread moves 16 bytes at a time where arrays allow it, and no register
spills (`benchmarks/results/compiled_kernels.md`). None was timed.

Letters: R rows of the sparse operand of a product, P columns of the dense one
"""

import math
from typing import NamedTuple

from pallas_kernels.nm_matmul.packing import TILE
from pallas_kernels.triton.tile_tables import Tile, find_row


class SparseTile(NamedTuple):
    """How a product with a sparse operand is cut.

    Attributes:
      rows: of the sparse operand, a power of two of 64 or more.
      columns: of the dense operand, 64 or 128.
      warps_along_rows: of 32 threads; each has at least two strips of 16 rows with a gate.
      warps_along_columns: likewise.
      stages: steps that are copied ahead, plus one.
    """

    rows: int
    columns: int
    warps_along_rows: int
    warps_along_columns: int
    stages: int

    @property
    def warps(self) -> int:
        """Of 32 threads, for each program."""
        return self.warps_along_rows * self.warps_along_columns

    @property
    def shared_bytes(self) -> int:
        """Bytes of the ring: values, metadata and the dense operand of 64 positions a step."""
        return self.stages * (self.rows * (TILE + TILE // 8) + 2 * TILE * self.columns)

    def __str__(self) -> str:
        cut = f"{self.rows}x{self.columns}x{TILE}"
        return f"{cut} {self.warps} warps {self.stages} stages"


class Tiles(NamedTuple):
    """Tiles of one device.

    Attributes:
      pack: of a weight, 64 x 64 everywhere, whose metadata are whole words along either axis.
      prune: bytes of an entry -> groups in all.
      product: of a product with a sparse operand.
      wide_product: likewise, where it leaves no processor without a program; None if there is none.
      processors: of the smallest device in `gpu_targets.toml`.
    """

    pack: Tile
    prune: dict[int, int]
    product: SparseTile
    wide_product: SparseTile | None
    processors: int


_WARPS = 4
# Three stages leave an A100 room for two programs, and fit where a block has 99 KB.
_NARROW = SparseTile(128, 128, 2, 2, 3)
# A step multiplies for twice as long for each number of the dense operand that it reads.
_WIDE = SparseTile(256, 128, 4, 2, 4)
# Eight entries of two bytes, or four of four, of each row of groups for each of 128 threads.
_PACK, _PRUNE = Tile(TILE, TILE, _WARPS, 1), {2: 1024, 4: 512}
_TABLE = {
    (8, 0): Tiles(_PACK, _PRUNE, _NARROW, _WIDE, 108),
    (8, 6): Tiles(_PACK, _PRUNE, _NARROW, None, 82),
    (8, 9): Tiles(_PACK, _PRUNE, _NARROW, None, 128),
    (9, 0): Tiles(_PACK, _PRUNE, _NARROW, _WIDE, 132),
    (10, 0): Tiles(_PACK, _PRUNE, _NARROW, _WIDE, 148),
    (12, 0): Tiles(_PACK, _PRUNE, _NARROW, None, 170),
}
# Writing the sums of a part, and reading them again, takes as long as this many steps of 64: for a
# tile of 128 x 128, 128 KB at 13 bytes a cycle and processor of an A100, against 512 cycles a step.
_SPLIT_STEPS = 20
_MOST_SPLITS = 8
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


def find_product_tile(
    capability: tuple[int, int], *, rows: int, columns: int, divides_columns: bool
) -> SparseTile:
    """Return the tile of a product.

    Args:
      capability: (major, minor), at least (8, 0).
      rows: int, R, a multiple of 64, which the tile divides.
      columns: int, P.
      divides_columns: bool, the tile divides P, a multiple of 64.

    Example:
      >>> find_product_tile((8, 0), rows=192, columns=4096, divides_columns=False)
      SparseTile(rows=64, columns=128, warps_along_rows=2, warps_along_columns=2, stages=3)
    """
    tiles = find_row(_TABLE, capability)
    wide, narrow = tiles.wide_product, tiles.product
    if wide is not None and rows % wide.rows == 0 and columns >= wide.columns:
        programs = rows // wide.rows * -(-columns // wide.columns)
        if programs >= tiles.processors and not (divides_columns and columns % wide.columns):
            return wide
    width = math.gcd(narrow.columns, columns) if divides_columns else narrow.columns
    if not divides_columns and columns <= narrow.columns // 2:
        width = narrow.columns // 2
    return narrow._replace(rows=math.gcd(narrow.rows, rows), columns=width)


def count_splits(
    capability: tuple[int, int], cut: SparseTile, rows: int, contraction: int, columns: int
) -> int:
    """Return in how many parts a contraction is divided, so that no processor is idle.

    Programs that the processors take in turns end together only if their number is right. More and
    shorter ones come closer, and write and read sums of parts: the number with the least modelled
    time is taken, and 1 wherever that is as good.

    Args:
      capability: (major, minor), at least (8, 0).
      cut: tile of the product.
      rows: int, R.
      contraction: int, C, a multiple of 64.
      columns: int, P.

    Example:
      >>> cut = find_product_tile((8, 0), rows=768, columns=768, divides_columns=True)
      >>> count_splits((8, 0), cut, 768, 16384, 768), count_splits((8, 0), cut, 768, 768, 16384)
      (3, 1)
    """
    processors, steps = find_row(_TABLE, capability).processors, contraction // TILE
    programs = rows // cut.rows * -(-columns // cut.columns)
    # Each count gives parts of equal length, but for the last.
    counts = sorted({-(-steps // -(-steps // n)) for n in range(1, _MOST_SPLITS + 1)})

    def count_steps(splits: int) -> int:
        turns = -(-programs * splits // processors)
        return turns * (-(-steps // splits) + (_SPLIT_STEPS if splits > 1 else 0))

    return min(counts, key=count_steps)
