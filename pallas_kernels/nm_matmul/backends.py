"""The backends of `nm_matmul`, of `pack_nm` and of `prune_mvue`, in order of preference."""

from pallas_kernels.backends import Backend, always
from pallas_kernels.nm_matmul import mosaic_sm90, reference, triton, xla
from pallas_kernels.nm_matmul.call import (
    NMArrays,
    NMFacts,
    PackArrays,
    PackFacts,
    PruneArrays,
    PruneFacts,
)

BACKENDS: tuple[Backend[NMArrays, NMFacts], ...] = (
    Backend(
        name="mosaic_sm90",
        run=mosaic_sm90.run,
        check=mosaic_sm90.check,
        needs_verdict=True,
        tile=mosaic_sm90.tile,
    ),
    Backend(
        name="triton",
        run=triton.run,
        check=triton.check,
        needs_verdict=True,
        tile=triton.tile,
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
    Backend(
        name="triton",
        run=triton.pack_weight,
        check=triton.check_packing,
        needs_verdict=True,
        tile=triton.tile_packing,
    ),
    Backend(name="xla", run=xla.pack_weight, suits=always),
)

PRUNE_BACKENDS: tuple[Backend[PruneArrays, PruneFacts], ...] = (
    Backend(
        name="triton",
        run=triton.prune,
        check=triton.check_pruning,
        needs_verdict=True,
        tile=triton.tile_pruning,
    ),
    Backend(name="xla", run=xla.prune, suits=always),
)
