"""Fences that Pallas leaves out."""

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
from jaxlib.mlir.dialects import nvvm

from pallas_kernels.dispatch import is_interpreted


def fence_products() -> None:
    """Let tensor-core products see registers that were written so far.

    Pallas does so when an accumulator is made and not in every step of a loop; ptxas would add it.
    """
    if is_interpreted():
        return

    @plgpu.inline_mgpu()
    def fence(_):
        nvvm.wgmma_fence_aligned()

    # Type checkers take the decorated function for one that still wants the launch context.
    run: Any = fence
    run()
