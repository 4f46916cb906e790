"""How the Hopper kernel cuts a product into tiles: as measured, or by a model of the time.

Letters: R rows, C columns of the sparse operand, P columns of the dense one.
"""

from pallas_kernels.hopper.budget import NUM_COMPUTE, SHARED_MEMORY_BYTES
from pallas_kernels.nm_matmul.mosaic_sm90.cut import Problem, Tiles, count_shared_bytes
from pallas_kernels.nm_matmul.packing import TILE

TUNED: dict[tuple[int, int, int, bool], Tiles] = {}
"""(R, C, P, whether R holds gates) -> Tiles, as measured on a GPU; none has been measured yet."""

_CONTRACTION = 64
_MAX_STAGES = 6
# Of an H100 and an H200.
_SHARED_BYTES_PER_CYCLE = 128
# Blocks and columns of tiles whose groups of instructions ptxas 13.5 splits in two, with a wait
# between them, to rename registers of the sums.
_SPLIT_BY_PTXAS = (2, 64)
# Cycles to fill the ring and to write a tile; only their order of magnitude matters.
_TILE_CYCLES = 3000


def default_config(
    rows: int,
    contraction: int,
    columns: int,
    dtype: str,
    *,
    num_programs: int,
    is_gated: bool = False,
    pads_columns: bool = True,
) -> Tiles:
    """Choose the tiles of a product.

    Without a measurement, those with the least modelled time. A step of the contraction takes as
    long as its tensor-core instructions or as its traffic of shared memory, whichever is longer,
    and the tiles of the result are spread evenly over the processors. Shared memory is the tighter
    of the two at twice the rate of dense instructions, so wide tiles win where there are enough.

    Args:
      rows: int, R, multiple of 64.
      contraction: int, C, multiple of 64.
      columns: int, P.
      dtype: str, "bfloat16" or "float16"; both run at the same rate.
      num_programs: int, processors of the GPU.
      is_gated: bool, half of the rows gate the other half.
      pads_columns: bool, P may be filled up to a multiple of a tile; else tiles divide it.

    Raises:
      NotImplementedError: if no tile divides P.

    Example:
      >>> tiles = default_config(4096, 4096, 4096, "bfloat16", num_programs=132)
      >>> tiles.rows, tiles.columns
      (128, 256)
    """
    measured = TUNED.get((rows, contraction, columns, is_gated))
    if measured is not None:
        return measured
    candidates = [
        (blocks, width)
        for blocks in ((2,) if is_gated else (1, 2))
        for width in range(256 // blocks, 0, -32)
        if columns % width == 0 or (pads_columns and width in (256, 128, 64, 32))
        if (blocks, width) != _SPLIT_BY_PTXAS
    ]
    if not candidates:
        raise NotImplementedError(
            f"the Hopper kernel takes tiles of 32 columns and more, which do not divide {columns}"
        )

    def count_cycles(candidate: tuple[int, int]) -> int:
        blocks, width = candidate
        tile_rows = NUM_COMPUTE * blocks * TILE
        num_tiles = -(-rows // tile_rows) * -(-columns // width)
        instructions = NUM_COMPUTE * blocks
        # One instruction covers 32 columns of the sparse operand, 16 values of 64 rows, and reads
        # 32 rows of the dense operand.
        tensor = instructions * width // 2
        dense_bytes, value_bytes = 64 * width, 32 * TILE
        traffic = instructions * (dense_bytes + 2 * value_bytes) + dense_bytes
        step = max(tensor, traffic // _SHARED_BYTES_PER_CYCLE)
        return -(-num_tiles // num_programs) * (contraction // 32 * step + _TILE_CYCLES)

    blocks, width = min(candidates, key=count_cycles)
    problem = Problem(
        rows=rows,
        contraction=contraction,
        columns=columns,
        dtype=dtype,
        dense_is_transposed=True,
        has_bias=True,
    )
    stages = max(
        stages
        for stages in range(2, _MAX_STAGES + 1)
        if count_shared_bytes(problem, Tiles(blocks, width, _CONTRACTION, stages))
        <= SHARED_MEMORY_BYTES
    )
    return Tiles(blocks, width, _CONTRACTION, stages)
