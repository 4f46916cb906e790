"""The backends of `transposable_mask`, in order of preference."""

from pallas_kernels.backends import Backend, always
from pallas_kernels.transposable_mask import reference, triton, xla
from pallas_kernels.transposable_mask.call import TransposableArrays, TransposableFacts

BACKENDS: tuple[Backend[TransposableArrays, TransposableFacts], ...] = (
    Backend(name="triton", run=triton.run, check=triton.check, needs_verdict=True),
    Backend(name="reference", run=reference.run),
    Backend(name="xla", run=xla.run, suits=always),
)
