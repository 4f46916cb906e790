"""The backends of `block_sparse_matmul`, in order of preference."""

from pallas_kernels.backends import Backend, always
from pallas_kernels.block_sparse_matmul import mosaic_sm90, reference, triton, xla
from pallas_kernels.block_sparse_matmul.call import BlockArrays, BlockFacts

BACKENDS: tuple[Backend[BlockArrays, BlockFacts], ...] = (
    Backend(
        name="mosaic_sm90",
        run=mosaic_sm90.run,
        check=mosaic_sm90.check,
        needs_verdict=True,
        tile=mosaic_sm90.tile,
    ),
    Backend(
        name="triton", run=triton.run, check=triton.check, needs_verdict=True, tile=triton.tile
    ),
    Backend(name="reference", run=reference.run),
    Backend(name="xla", run=xla.run, suits=always),
)
