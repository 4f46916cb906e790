"""The backends of `mean_attention_map`, in order of preference."""

from pallas_kernels.attention_map import mosaic_sm90, reference, triton, xla
from pallas_kernels.attention_map.call import MapArrays, MapFacts
from pallas_kernels.backends import Backend, always

BACKENDS: tuple[Backend[MapArrays, MapFacts], ...] = (
    Backend(name="mosaic_sm90", run=mosaic_sm90.run, check=mosaic_sm90.check, needs_verdict=True),
    Backend(
        name="triton", run=triton.run, check=triton.check, tile=triton.tile, needs_verdict=True
    ),
    Backend(name="reference", run=reference.run),
    Backend(name="xla", run=xla.run, suits=always),
)
