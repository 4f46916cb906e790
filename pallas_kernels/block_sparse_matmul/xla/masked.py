"""Products with a block-sparse weight as dense products: the form for a CPU that keeps many blocks.

Pruned weights are multiplied too, as zeros. A large product runs at some three times the rate of
products of one block, so that from about a quarter of the blocks on it takes less time than those.

Letters: M rows (tokens)   K contracted axis   N columns   I x J blocks of the weight.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_matmul.reference import expand

_dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)


def multiply(
    x_MK: jax.Array, w_KN: jax.Array, mask_IJ: jax.Array, bias_N: jax.Array | None
) -> jax.Array:
    """Multiply by the masked weight, and add the bias.

    Args:
      x_MK: float[M, K].
      w_KN: float[K, N], dtype of x.
      mask_IJ: bool[I, J].
      bias_N: float[N] or None.

    Returns:
      f32[M, N].
    """
    y_MN = _dot(x_MK, _mask(w_KN, mask_IJ))
    return y_MN if bias_N is None else y_MN + bias_N.astype(jnp.float32)[None]


def multiply_transposed(dy_MN: jax.Array, w_KN: jax.Array, mask_IJ: jax.Array) -> jax.Array:
    """Multiply by the transpose of the masked weight.

    Args:
      dy_MN: float[M, N].
      w_KN: float[K, N], dtype of dy.
      mask_IJ: bool[I, J].

    Returns:
      f32[M, K].
    """
    return _dot(dy_MN, _mask(w_KN, mask_IJ).T)


def multiply_gradient(x_MK: jax.Array, dy_MN: jax.Array, mask_IJ: jax.Array) -> jax.Array:
    """Compute x^T dy, and keep the blocks of the mask.

    Args:
      x_MK: float[M, K].
      dy_MN: float[M, N], dtype of x.
      mask_IJ: bool[I, J].

    Returns:
      f32[K, N], 0 elsewhere.
    """
    return _mask(_dot(x_MK.T, dy_MN), mask_IJ)


def _mask(values_KN, mask_IJ) -> jax.Array:
    # Not a product: NaN * 0 is NaN.
    return jnp.where(expand(mask_IJ, values_KN.shape), values_KN, 0)
