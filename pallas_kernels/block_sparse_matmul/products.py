"""The three products that a backend of `block_sparse_matmul` offers.

Letters: M rows (tokens)   K contracted axis   N columns   I x J blocks of the weight.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from pallas_kernels.block_sparse_matmul import xla


class Products(NamedTuple):
    """A backend.

    Attributes:
      check: (x_MK, w_KN, mask_IJ) -> None; raises NotImplementedError where it does not run.
      multiply: (x_MK, w_KN, mask_IJ) -> f32[M, N], or x's dtype.
      multiply_transposed: (dy_MN, w_KN, mask_IJ) -> [M, K].
      multiply_gradient: (x_MK, dy_MN, mask_IJ) -> [K, N], 0 where the mask is False.
    """

    check: Callable[[jax.Array, jax.Array, jax.Array], None]
    multiply: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    multiply_transposed: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    multiply_gradient: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _check_nothing(x_MK: jax.Array, w_KN: jax.Array, mask_IJ: jax.Array) -> None:
    del x_MK, w_KN, mask_IJ


PRODUCTS: dict[str, Products] = {
    "xla": Products(
        check=_check_nothing,
        multiply=xla.multiply,
        multiply_transposed=xla.multiply_transposed,
        multiply_gradient=xla.multiply_gradient,
    ),
}
"""By the name of the implementation."""
