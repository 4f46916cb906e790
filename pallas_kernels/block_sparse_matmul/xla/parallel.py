"""Products with a block-sparse weight, all columns of blocks at once: the form for a GPU.

The kept blocks of a column are a list. Columns are sorted by the length of their lists and cut
into a few tiles; a tile is one batch of products, and a loop takes it along its lists
(`pallas_kernels.block_lists`). The product with the transpose has rows in the place of columns.

Tokens come last, so that blocks of x lie side by side as they are gathered.

Letters: M rows (tokens)   K contracted axis, or what a block has of it   N columns, likewise
I x J blocks of the weight   R lists of a tile   W list positions walked at once   Y = I x J.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.block_lists import gather_blocks, list_kept, make_tiles, walk_tiles
from pallas_kernels.block_sparse_matmul.call import find_sides
from pallas_kernels.meshes import vary_like

_matmul = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


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
    y_MN = _sum_over_lists(x_MK, w_KN, mask_IJ)
    return y_MN if bias_N is None else y_MN + bias_N.astype(jnp.float32)[None]


def multiply_transposed(dy_MN: jax.Array, w_KN: jax.Array, mask_IJ: jax.Array) -> jax.Array:
    """Multiply by the transpose of the kept blocks.

    Args:
      dy_MN: float[M, N].
      w_KN: float[K, N], dtype of dy.
      mask_IJ: bool[I, J].

    Returns:
      f32[M, K].
    """
    return _sum_over_lists(dy_MN, w_KN.T, mask_IJ.T)


def multiply_gradient(x_MK: jax.Array, dy_MN: jax.Array, mask_IJ: jax.Array) -> jax.Array:
    """Compute the kept blocks of x^T dy.

    Args:
      x_MK: float[M, K].
      dy_MN: float[M, N], dtype of x.
      mask_IJ: bool[I, J].

    Returns:
      f32[K, N], 0 elsewhere.
    """
    (num_rows, num_columns), (K, N) = mask_IJ.shape, (x_MK.shape[1], dy_MN.shape[1])
    rows, columns = find_sides(mask_IJ, (K, N))
    x_1IKM, dy_1JNM = _split_features(x_MK, num_rows), _split_features(dy_MN, num_columns)
    counts_J, visited_JI = list_kept(mask_IJ.T)

    def walk(_, tile):
        dy_1RNM = dy_1JNM[:, tile.owner]

        # Every block is written once, in its place on the list: nothing is scattered or added up.
        def set_blocks(step, dw_1RKN):
            visited_RW, _ = tile.walk(step, rows)
            part = _matmul("xrkm,xrnm->xrkn", gather_blocks(x_1IKM, visited_RW), dy_1RNM)
            start = step * tile.width * rows
            return jax.lax.dynamic_update_slice_in_dim(dw_1RKN, part, start, axis=2)

        lists, positions = tile.visited.shape
        start = vary_like(jnp.zeros((1, lists, positions * rows, columns), jnp.float32), x_MK)
        return None, (jax.lax.fori_loop(0, tile.num_steps, set_blocks, start),)

    _, (dw_1JKN,) = walk_tiles(
        walk, None, make_tiles(counts_J, visited_JI, block=rows, parallel=True)
    )
    place_JI = jnp.argsort(visited_JI, axis=-1)
    listed_JIKN = dw_1JKN.reshape(num_columns, -1, rows, columns)
    dw_JIKN = jnp.take_along_axis(listed_JIKN, place_JI[:, :, None, None], axis=1)
    # What came by in the padding of a list is dropped here.
    dw_JIKN = jnp.where(mask_IJ.T[:, :, None, None], dw_JIKN, 0)
    return dw_JIKN.transpose(1, 2, 0, 3).reshape(K, N)


def _sum_over_lists(x_MK: jax.Array, w_KN: jax.Array, mask_IJ: jax.Array) -> jax.Array:
    """Return f32[M, N], x times the kept blocks of w: for each column a sum over its list."""
    (num_rows, num_columns), (K, N), M = mask_IJ.shape, w_KN.shape, x_MK.shape[0]
    rows, columns = find_sides(mask_IJ, (K, N))
    x_1IKM = _split_features(x_MK, num_rows)
    w_IJKN = w_KN.reshape(num_rows, rows, num_columns, columns).swapaxes(1, 2)
    w_1YKN = w_IJKN.reshape(1, -1, rows, columns)
    counts_J, visited_JI = list_kept(mask_IJ.T)

    def walk(_, tile):
        def add_blocks(step, total_1RNM):
            visited_RW, listed_RK = tile.walk(step, rows)
            # A list's padding may meet NaN in x as well as in what w holds in pruned blocks.
            x_1RKM, w_1RKN = (
                jnp.where(listed_RK[..., None], gather_blocks(blocks, index_RW), 0)
                for blocks, index_RW in (
                    (x_1IKM, visited_RW),
                    (w_1YKN, visited_RW * num_columns + tile.owner[:, None]),
                )
            )
            return total_1RNM + _matmul("xrkn,xrkm->xrnm", w_1RKN, x_1RKM)

        start = vary_like(jnp.zeros((1, tile.owner.shape[0], columns, M), jnp.float32), x_MK)
        return None, (jax.lax.fori_loop(0, tile.num_steps, add_blocks, start),)

    _, (y_1JNM,) = walk_tiles(
        walk, None, make_tiles(counts_J, visited_JI, block=rows, parallel=True)
    )
    return y_1JNM.reshape(N, M).T


def _split_features(x_MK: jax.Array, blocks: int) -> jax.Array:
    """[M, K] -> [1, blocks, K / blocks, M]."""
    return x_MK.T.reshape(1, blocks, -1, x_MK.shape[0])
