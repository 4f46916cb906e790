"""Shared memory of matrices that tensor cores read, and that copies fill."""

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp


def matrix_transforms(columns: int, dtype: Any) -> tuple[Any, ...]:
    """Describe how a matrix lies in shared memory: in tiles of eight rows, each swizzled.

    Args:
      columns: int, of the matrix; a row has a multiple of 32 bytes.
      dtype: of its entries.

    Returns:
      tuple of transforms, with the widest swizzle that rows are a multiple of.
    """
    size = jnp.dtype(dtype).itemsize
    swizzle = next(width for width in (128, 64, 32) if columns * size % width == 0)
    # Type checkers take both classes for abstract.
    tiling: Any = plgpu.TilingTransform
    swizzling: Any = plgpu.SwizzleTransform
    return tiling((8, swizzle // size)), swizzling(swizzle)


def matrix_smem(shape: tuple[int, ...], dtype: Any) -> Any:
    """Describe shared memory for matrices.

    Args:
      shape: [..., rows, columns].
      dtype: of the entries.

    Returns:
      scratch type of `plgpu.kernel`.
    """
    return plgpu.SMEM(shape, dtype, transforms=matrix_transforms(shape[-1], dtype))
