"""The call of a kernel in Mosaic GPU."""

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu

from pallas_kernels.meshes import vary_like


def call_mosaic(kernel: Callable[..., None], *inputs: jax.Array, **options: Any) -> Any:
    """Call a kernel, traced with integers of 32 bits whatever `jax_enable_x64` says.

    Args:
      kernel: body, of references.
      *inputs: arrays.
      **options: of `plgpu.kernel`.

    Returns:
      arrays as `out_type` says.
    """
    with jax.enable_x64(False):
        results = plgpu.kernel(kernel, **options)(*inputs)
    # Their type does not say that they vary from device to device.
    return vary_like(results, inputs)
