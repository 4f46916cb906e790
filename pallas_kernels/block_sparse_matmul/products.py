"""The three products that a backend of `block_sparse_matmul` offers.

Letters: M rows (tokens)   K contracted axis   N columns   I x J blocks of the weight.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from pallas_kernels.block_sparse_matmul import mosaic_sm90, xla


class Products(NamedTuple):
    """A backend.

    Attributes:
      check: (x_MK, w_KN, mask_IJ) -> None; raises NotImplementedError where it does not run.
      multiply: (x_MK, w_KN, mask_IJ, bias_N or None) -> [M, N], in f32 or in the dtype of x; the
        bias is added in f32.
      multiply_transposed: (dy_MN, w_KN, mask_IJ) -> [M, K], likewise.
      multiply_gradient: (x_MK, dy_MN, mask_IJ) -> [K, N], likewise; 0 where the mask is False.
    """

    check: Callable[[jax.Array, jax.Array, jax.Array], None]
    multiply: Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]
    multiply_transposed: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    multiply_gradient: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _check_nothing(x_MK: jax.Array, w_KN: jax.Array, mask_IJ: jax.Array) -> None:
    del x_MK, w_KN, mask_IJ


PRODUCTS: dict[str, Products] = {
    "mosaic_sm90": Products(
        check=mosaic_sm90.check,
        multiply=mosaic_sm90.multiply,
        multiply_transposed=mosaic_sm90.multiply_transposed,
        multiply_gradient=mosaic_sm90.multiply_gradient,
    ),
    "xla": Products(
        check=_check_nothing,
        multiply=xla.multiply,
        multiply_transposed=xla.multiply_transposed,
        multiply_gradient=xla.multiply_gradient,
    ),
}
"""By the name of the implementation."""
