"""Products with a block-sparse weight, one kept block after another: the form for a CPU.

Loops over lists of kept blocks, whose lengths are traced values. Slices lie where the operands have
them, so that nothing is laid out anew: of 12 x 48 blocks, copies of the operands in blocks cost
more than a tenth of the product.

Letters: M rows (tokens)   K contracted axis   N columns   I x J blocks of the weight   P list
positions.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_matmul.call import find_sides
from pallas_kernels.meshes import vary_like

# An output with fewer blocks in its list, all kept, gains less by being summed up before it is
# written than a loop of its own costs.
_LONG_LIST = 16
# Blocks with less to contract over are multiplied several at a time.
_CONTRACTED = 64

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
    """Add x w, or x w^T, to what is there."""
    inner_blocks = mask_IJ.shape[1 if transposed else 0]
    add = _add_lists if inner_blocks >= _LONG_LIST else _add_blocks
    return add(start, x, w_KN, mask_IJ, transposed=transposed)


def _add_blocks(start, x, w_KN, mask_IJ, *, transposed: bool) -> jax.Array:
    """Add one product of a kept block after another to its columns of the result."""
    count, i_P, j_P = _list_kept(mask_IJ, by_column=not transposed)
    slices = _Slices(x, w_KN, mask_IJ, transposed)

    def add_block(p, total):
        output = i_P[p] if transposed else j_P[p]
        new = slices.read(total, output) + slices.multiply([(i_P[p], j_P[p])])
        return slices.write(total, new, output)

    return jax.lax.fori_loop(0, count, add_block, start)


def _add_lists(start, x, w_KN, mask_IJ, *, transposed: bool) -> jax.Array:
    """Sum up the kept blocks of an output, a few in one product, before they are added to it."""
    lists = mask_IJ if transposed else mask_IJ.T
    counts, visited = lists.sum(1, dtype=jnp.int32), jnp.argsort(~lists, axis=1, stable=True)
    slices = _Slices(x, w_KN, mask_IJ, transposed)
    width = max(1, _CONTRACTED // slices.inner)

    def add_list(output, total):
        def add_blocks(width, step, part):
            first = step * width
            inner = [visited[output, first + place] for place in range(width)]
            return part + slices.multiply(
                [(output, i) if transposed else (i, output) for i in inner]
            )

        whole = counts[output] // width
        part = slices.read(total, output)
        part = jax.lax.fori_loop(0, whole, functools.partial(add_blocks, width), part)
        if width > 1:
            rest = functools.partial(add_blocks, 1)
            part = jax.lax.fori_loop(whole * width, counts[output], rest, part)
        return slices.write(total, part, output)

    return jax.lax.fori_loop(0, lists.shape[0], add_list, start)


class _Slices:
    """Parts of x, of w and of the result, for x w or x w^T.

    Attributes:
      inner: int, what is contracted over in a block.
    """

    def __init__(self, x, w_KN, mask_IJ, transposed: bool):
        self._x, self._w_KN, self._transposed = x, w_KN, transposed
        self._sides = find_sides(mask_IJ, w_KN.shape)
        self.inner, self._outer = self._sides[::-1] if transposed else self._sides

    def multiply(self, blocks):
        """Return f32[M, outer], the sum of the products of blocks (i, j) of one output."""
        rows, columns = self._sides
        parts = [
            jax.lax.dynamic_slice_in_dim(
                self._x, (j if self._transposed else i) * self.inner, self.inner, axis=1
            )
            for i, j in blocks
        ]
        weights = [
            jax.lax.dynamic_slice(self._w_KN, (i * rows, j * columns), self._sides)
            for i, j in blocks
        ]
        weights = [w.T for w in weights] if self._transposed else weights
        return _dot(jnp.concatenate(parts, axis=1), jnp.concatenate(weights, axis=0))

    def read(self, total, output):
        """Return [M, outer], the columns of one output."""
        return jax.lax.dynamic_slice_in_dim(total, output * self._outer, self._outer, axis=1)

    def write(self, total, part, output):
        """Return the result with the columns of one output replaced."""
        return jax.lax.dynamic_update_slice_in_dim(total, part, output * self._outer, axis=1)


def _list_kept(mask_IJ: jax.Array, *, by_column: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return how many blocks are kept, and where: those of one output side by side."""
    ordered = mask_IJ.T if by_column else mask_IJ
    place_P = jnp.argsort(~ordered.ravel(), stable=True).astype(jnp.int32)
    outer_P, inner_P = jnp.divmod(place_P, ordered.shape[1])
    i_P, j_P = (inner_P, outer_P) if by_column else (outer_P, inner_P)
    return mask_IJ.sum(dtype=jnp.int32), i_P, j_P
