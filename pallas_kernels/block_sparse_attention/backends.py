"""The backends of `block_sparse_attention`, in order of preference."""

from pallas_kernels.backends import Backend, always
from pallas_kernels.block_sparse_attention import dense, mosaic_sm90, reference, triton, xla
from pallas_kernels.block_sparse_attention.call import AttentionArrays, AttentionFacts

BACKENDS: tuple[Backend[AttentionArrays, AttentionFacts], ...] = (
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
    Backend(name="dense", run=dense.run, suits=dense.suits),
    Backend(name="reference", run=reference.run),
    Backend(name="xla", run=xla.run, suits=always),
)
