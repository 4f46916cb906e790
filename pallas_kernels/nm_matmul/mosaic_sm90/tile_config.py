"""How the Hopper kernel cuts a product into tiles: as measured, or by a model of the time.

Letters: R rows, C columns of the sparse operand, P columns of the dense one.
"""

import dataclasses

from pallas_kernels.hopper.budget import NUM_COMPUTE, SHARED_MEMORY_BYTES
from pallas_kernels.nm_matmul.activations import GATED
from pallas_kernels.nm_matmul.mosaic_sm90.cut import Problem, Tiles, count_shared_bytes
from pallas_kernels.nm_matmul.packing import TILE

TUNED: dict[tuple[int, int, int, bool], Tiles] = {}
"""(R, C, P, whether R holds gates) -> Tiles, as measured on a GPU; none has been measured yet."""

_CONTRACTION = 64
_MAX_STAGES = 6
# Of each processor of an H100 and an H200. Of the second-level cache, 30 to 35 are expected while
# all processors read.
_SHARED_BYTES_PER_CYCLE = 128
_L2_BYTES_PER_CYCLE = 32
_LEAST_COLUMNS = 32
# Blocks, columns and cluster of tiles that are not taken. Of the first two, ptxas 13.5 splits
# groups of instructions, with a wait between the halves, to rename registers of the sums. With the
# third it spills.
_AVOIDED = {(2, 64, 1), (2, 64, 2), (1, 192, 2)}
# Cycles to fill the ring and to write a tile; only their order of magnitude matters.
_TILE_CYCLES = 3000


def default_config(
    rows: int,
    contraction: int,
    columns: int,
    dtype: str,
    *,
    num_programs: int,
    activation: str | None = None,
) -> Tiles:
    """Choose the tiles of a product.

    Without a measurement, those with the least modelled time. A step of the contraction takes as
    long as its tensor-core instructions, as its traffic of shared memory or as what it reads of the
    second-level cache, whichever is longest, and the tiles of the result are spread evenly over the
    processors. Shared memory is the tightest at twice the rate of dense instructions, so wide tiles
    win where there are enough. Two programs in a cluster read the dense operand once, so that the
    cache keeps up.

    Args:
      rows: int, R, multiple of 64.
      contraction: int, C, multiple of 64.
      columns: int, P.
      dtype: str, "bfloat16" or "float16"; both run at the same rate.
      num_programs: int, processors of the GPU.
      activation: str or None, that the kernel applies; of a gated one, half of the rows are gates.

    Example:
      >>> tiles = default_config(4096, 4096, 4096, "bfloat16", num_programs=132)
      >>> tiles.rows, tiles.columns
      (128, 256)
    """
    is_gated = activation in GATED
    measured = TUNED.get((rows, contraction, columns, is_gated))
    if measured is not None:
        return measured
    most = count_most_columns(activation)
    candidates = [
        Tiles(blocks, width, _CONTRACTION, _MAX_STAGES, cluster)
        for blocks in ((2,) if is_gated else (1, 2))
        for width in range(min(most // blocks, 256), 0, -_LEAST_COLUMNS)
        for cluster in (1, 2)
        if width <= max(columns, _LEAST_COLUMNS)
        if (blocks, width, cluster) not in _AVOIDED
        # A second program of a cluster has rows of its own.
        if cluster == 1 or (rows > NUM_COMPUTE * blocks * TILE and num_programs > 1)
    ]

    def count_cycles(tiles: Tiles) -> float:
        clusters = -(-rows // (tiles.cluster * tiles.rows)) * -(-columns // tiles.columns)
        rounds = -(-clusters // (num_programs // tiles.cluster))
        return rounds * (contraction // 32 * _count_step(tiles) + _TILE_CYCLES)

    tiles = min(candidates, key=count_cycles)
    problem = Problem(
        rows=rows,
        contraction=contraction,
        columns=columns,
        dtype=dtype,
        dense_is_transposed=True,
        has_bias=True,
    )
    while count_shared_bytes(problem, tiles) > SHARED_MEMORY_BYTES:
        tiles = dataclasses.replace(tiles, stages=tiles.stages - 1)
    return tiles


def count_most_columns(activation: str | None) -> int:
    """Count the columns whose sums a warpgroup has registers for.

    Args:
      activation: str or None; an activation needs registers of its own.

    Returns:
      int, of all blocks of 64 rows together.
    """
    return 384 if activation is None else 256


def _count_step(tiles: Tiles) -> float:
    """Count the cycles of 32 columns of the sparse operand."""
    instructions = NUM_COMPUTE * tiles.blocks
    # One instruction covers 16 values of each of 64 rows, and reads 32 rows of the dense operand.
    tensor = instructions * tiles.columns // 2
    dense_bytes, value_bytes, word_bytes = 64 * tiles.columns, 32 * TILE, 4 * TILE
    copied_bytes = instructions * (value_bytes + word_bytes) + dense_bytes
    shared_bytes = copied_bytes + instructions * (value_bytes + word_bytes + dense_bytes)
    l2_bytes = copied_bytes - dense_bytes + dense_bytes / tiles.cluster
    return max(tensor, shared_bytes / _SHARED_BYTES_PER_CYCLE, l2_bytes / _L2_BYTES_PER_CYCLE)
