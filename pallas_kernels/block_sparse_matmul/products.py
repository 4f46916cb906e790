"""The gradient rule of `block_sparse_matmul`, stated once for every backend that has its products.

  y = x (w * mask) + bias
  dx = dy (w * mask)^T,  dw = (x^T dy) * grad_mask,  dbias = sum dy

Letters: M rows (tokens)   K contracted axis   N columns   I x J blocks of the weight.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_matmul.call import BlockArrays


class BlockProducts(NamedTuple):
    """The three products of one backend, as pure functions of arrays.

    Attributes:
      multiply: (x_MK, w_KN, mask_IJ, bias_N or None) -> [M, N], in f32 or in the dtype of x; the
        bias is added in f32.
      multiply_transposed: (dy_MN, w_KN, mask_IJ) -> [M, K], likewise.
      multiply_gradient: (x_MK, dy_MN, mask_IJ) -> [K, N], likewise; 0 where the mask is False.
    """

    multiply: Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]
    multiply_transposed: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    multiply_gradient: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def multiply_blocks(arrays: BlockArrays, products: BlockProducts) -> jax.Array:
    """Multiply with the first product of a backend and differentiate with its others.

    Args:
      products: BlockProducts, static.

    Returns:
      float[M, N], typed like x.
    """
    return jnp.asarray(_multiply(*arrays, products))


def _multiply_plainly(x_MK, w_KN, mask_IJ, grad_mask_IJ, bias_N, products):
    del grad_mask_IJ
    return products.multiply(x_MK, w_KN, mask_IJ, bias_N).astype(x_MK.dtype)


_multiply = jax.custom_vjp(_multiply_plainly, nondiff_argnums=(5,))


def _multiply_forward(x_MK, w_KN, mask_IJ, grad_mask_IJ, bias_N, products):
    # The plain function, which forward mode passes through: derivatives of gradients need it.
    y_MN = _multiply_plainly(x_MK, w_KN, mask_IJ, grad_mask_IJ, bias_N, products)
    return y_MN, (x_MK, w_KN, mask_IJ, grad_mask_IJ, bias_N)


def _multiply_backward(products, saved, dy_MN):
    x_MK, w_KN, mask_IJ, grad_mask_IJ, bias_N = saved
    dx_MK = products.multiply_transposed(dy_MN, w_KN, mask_IJ).astype(x_MK.dtype)
    dw_KN = products.multiply_gradient(x_MK, dy_MN, grad_mask_IJ).astype(w_KN.dtype)
    dbias_N = None
    if bias_N is not None:
        dbias_N = dy_MN.astype(jnp.float32).sum(0).astype(bias_N.dtype)
    return dx_MK, dw_KN, None, None, dbias_N


_multiply.defvjp(_multiply_forward, _multiply_backward)
