"""Products with a block-sparse weight, one kept block after another: the form for a CPU.

One loop over the list of kept blocks, whose length is a traced value. Slices lie where the operands
have them, so that nothing is laid out anew: of 12 x 48 blocks, copies of the operands in blocks
cost more than a tenth of the product.

Letters: M rows (tokens)   K contracted axis   N columns   I x J blocks of the weight   P list
positions.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_matmul.call import find_sides
from pallas_kernels.meshes import vary_like

_dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)


def multiply(
    x_MK: jax.Array, w_KN: jax.Array, mask_IJ: jax.Array, bias_N: jax.Array | None
) -> jax.Array:
    """Multiply by the kept blocks, and add the bias.

    Args:
      x_MK: float[M, K].
      w_KN: float[K, N], dtype of x.
      mask_IJ: bool[I, J].
      bias_N: float[N] or None.

    Returns:
      f32[M, N].
    """
    start_MN = vary_like(jnp.zeros((x_MK.shape[0], w_KN.shape[1]), jnp.float32), x_MK)
    if bias_N is not None:
        start_MN += bias_N.astype(jnp.float32)[None]
    return _add_products(start_MN, x_MK, w_KN, mask_IJ, transposed=False)


def multiply_transposed(dy_MN: jax.Array, w_KN: jax.Array, mask_IJ: jax.Array) -> jax.Array:
    """Multiply by the transpose of the kept blocks.

    Args:
      dy_MN: float[M, N].
      w_KN: float[K, N], dtype of dy.
      mask_IJ: bool[I, J].

    Returns:
      f32[M, K].
    """
    start_MK = vary_like(jnp.zeros((dy_MN.shape[0], w_KN.shape[0]), jnp.float32), dy_MN)
    return _add_products(start_MK, dy_MN, w_KN, mask_IJ, transposed=True)


def multiply_gradient(x_MK: jax.Array, dy_MN: jax.Array, mask_IJ: jax.Array) -> jax.Array:
    """Compute the kept blocks of x^T dy.

    Args:
      x_MK: float[M, K].
      dy_MN: float[M, N], dtype of x.
      mask_IJ: bool[I, J].

    Returns:
      f32[K, N], 0 elsewhere.
    """
    K, N = x_MK.shape[1], dy_MN.shape[1]
    rows, columns = find_sides(mask_IJ, (K, N))
    count, i_P, j_P = _list_kept(mask_IJ, by_column=True)

    def set_block(p, dw_KN):
        k, n = i_P[p] * rows, j_P[p] * columns
        x = jax.lax.dynamic_slice_in_dim(x_MK, k, rows, axis=1)
        dy = jax.lax.dynamic_slice_in_dim(dy_MN, n, columns, axis=1)
        return jax.lax.dynamic_update_slice(dw_KN, _dot(x.T, dy), (k, n))

    start_KN = vary_like(jnp.zeros((K, N), jnp.float32), x_MK)
    return jax.lax.fori_loop(0, count, set_block, start_KN)


def _add_products(start, x, w_KN, mask_IJ, *, transposed: bool) -> jax.Array:
    """Add x w, or x w^T, to what is there, one kept block after another."""
    rows, columns = find_sides(mask_IJ, w_KN.shape)
    inner, outer = (columns, rows) if transposed else (rows, columns)
    count, i_P, j_P = _list_kept(mask_IJ, by_column=not transposed)

    def add_block(p, total):
        k, n = i_P[p] * rows, j_P[p] * columns
        read, write = (n, k) if transposed else (k, n)
        part = jax.lax.dynamic_slice_in_dim(x, read, inner, axis=1)
        w = jax.lax.dynamic_slice(w_KN, (k, n), (rows, columns))
        old = jax.lax.dynamic_slice_in_dim(total, write, outer, axis=1)
        new = old + _dot(part, w.T if transposed else w)
        return jax.lax.dynamic_update_slice_in_dim(total, new, write, axis=1)

    return jax.lax.fori_loop(0, count, add_block, start)


def _list_kept(mask_IJ: jax.Array, *, by_column: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return how many blocks are kept, and where: those of one output side by side."""
    ordered = mask_IJ.T if by_column else mask_IJ
    place_P = jnp.argsort(~ordered.ravel(), stable=True).astype(jnp.int32)
    outer_P, inner_P = jnp.divmod(place_P, ordered.shape[1])
    i_P, j_P = (inner_P, outer_P) if by_column else (outer_P, inner_P)
    return mask_IJ.sum(dtype=jnp.int32), i_P, j_P
