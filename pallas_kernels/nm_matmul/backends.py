"""The backends of `nm_matmul`, and of `pack_nm`, in order of preference."""

from pallas_kernels.backends import Backend, always
from pallas_kernels.nm_matmul import mosaic_sm90, reference, xla
from pallas_kernels.nm_matmul.call import NMArrays, NMFacts, PackArrays, PackFacts

BACKENDS: tuple[Backend[NMArrays, NMFacts], ...] = (
    Backend(
        name="mosaic_sm90",
        run=mosaic_sm90.run,
        check=mosaic_sm90.check,
        needs_verdict=True,
        tile=mosaic_sm90.tile,
    ),
    Backend(name="reference", run=reference.run),
    Backend(name="xla", run=xla.run, suits=always),
)

PACK_BACKENDS: tuple[Backend[PackArrays, PackFacts], ...] = (
    Backend(
        name="mosaic_sm90",
        run=mosaic_sm90.pack_weight,
        check=mosaic_sm90.check_packing,
        needs_verdict=True,
    ),
    Backend(name="xla", run=xla.pack_weight, suits=always),
)
