"""The products of `block_sparse_matmul` in Triton: what runs, and what is refused.

  y = x w     for each column block of the weight, the list of its kept row blocks
  dx = dy w^T for each row block, the list of its kept column blocks
  dw = x^T dy for each block, all tokens, or none where the mask of the gradient is False

Letters: M rows (tokens)   K contracted axis   N columns   I x J blocks of the weight
B examples, which vmap makes, or 1.
"""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.block_lists import list_kept
from pallas_kernels.block_sparse_matmul.call import BlockArrays, BlockFacts
from pallas_kernels.block_sparse_matmul.products import BlockProducts, multiply_blocks
from pallas_kernels.block_sparse_matmul.triton.tiles import ProductTile, Tiles, find_tiles
from pallas_kernels.triton.batching import fold_vmap
from pallas_kernels.triton.device import check_device
from pallas_kernels.triton.launch import launch

# Sides of blocks are multiples of what one tensor-core instruction takes.
_STEP = 16
# Row tiles that are taken together: they stay in the cache while all columns read them.
_GROUP = 8


def check(facts: BlockFacts) -> None:
    """Refuse what the kernels do not do.

    Raises:
      NotImplementedError: with the reason.
    """
    _plan(facts)


def tile(facts: BlockFacts) -> str:
    """Name the tiles of the three products; "" where they cannot run."""
    try:
        _, tiles = _plan(facts)
    except NotImplementedError:
        return ""
    return ", ".join(f"{name} {cut}" for name, cut in tiles._asdict().items())


def run(arrays: BlockArrays, facts: BlockFacts) -> jax.Array:
    """Multiply by the kept blocks, and differentiate likewise.

    Returns:
      float[M, N], typed like x.

    Raises:
      NotImplementedError: if the device or the call is not one that the kernels take.

    Numerics:
      Products accumulate in f32, and those of f32 are not rounded to TF32. A repeated call agrees
      to the bit.
    """
    capability, tiles = _plan(facts)
    products = (
        functools.partial(product, tile=cut, capability=capability)
        for product, cut in zip(
            (multiply, multiply_transposed, multiply_gradient), tiles, strict=True
        )
    )
    return multiply_blocks(arrays, BlockProducts(*products))


def _plan(facts: BlockFacts) -> tuple[tuple[int, int], Tiles]:
    capability = check_device()
    sides = tuple(size // count for size, count in zip(facts.shape, facts.grid, strict=True))
    if any(side % _STEP for side in sides):
        raise NotImplementedError(
            f"the Triton kernels take blocks whose sides are multiples of {_STEP}, got {sides}"
        )
    if math.prod(facts.shape) >= 2**31:
        raise NotImplementedError(
            f"the Triton kernels count the elements of a weight in 32 bits, got {facts.shape}"
        )
    rows, columns = sides
    itemsize = jnp.dtype(facts.dtype).itemsize
    return capability, find_tiles(capability, itemsize, tokens=facts.rows, block=(rows, columns))


def multiply(
    x_MK: jax.Array,
    w_KN: jax.Array,
    mask_IJ: jax.Array,
    bias_N: jax.Array | None,
    *,
    tile: ProductTile,
    capability: tuple[int, int],
) -> jax.Array:
    """Multiply by the kept blocks, and add the bias before rounding.

    Args:
      x_MK: float[M, K].
      w_KN: float[K, N], dtype of x.
      mask_IJ: bool[I, J].
      bias_N: float[N] or None.
      tile: tokens by columns; it divides the blocks.
      capability: (major, minor), compute capability.

    Returns:
      float[M, N], dtype of x.
    """
    return _multiply_rows(
        x_MK, w_KN, mask_IJ, bias_N, transposed=False, tile=tile, capability=capability
    )


def multiply_transposed(
    dy_MN: jax.Array,
    w_KN: jax.Array,
    mask_IJ: jax.Array,
    *,
    tile: ProductTile,
    capability: tuple[int, int],
) -> jax.Array:
    """Multiply by the transpose of the kept blocks.

    Args:
      dy_MN: float[M, N].
      w_KN: float[K, N], dtype of dy.
      mask_IJ: bool[I, J].
      tile: tokens by rows of the weight; it divides the blocks.
      capability: (major, minor), compute capability.

    Returns:
      float[M, K], dtype of dy.
    """
    return _multiply_rows(
        dy_MN, w_KN, mask_IJ, None, transposed=True, tile=tile, capability=capability
    )


def multiply_gradient(
    x_MK: jax.Array,
    dy_MN: jax.Array,
    mask_IJ: jax.Array,
    *,
    tile: ProductTile,
    capability: tuple[int, int],
) -> jax.Array:
    """Compute the kept blocks of x^T dy.

    Args:
      x_MK: float[M, K].
      dy_MN: float[M, N], dtype of x.
      mask_IJ: bool[I, J].
      tile: rows by columns of the weight; it divides the blocks.
      capability: (major, minor), compute capability.

    Returns:
      float[K, N], dtype of x, 0 elsewhere.
    """
    launch_blocks = functools.partial(
        _launch_blocks, grid=mask_IJ.shape, tile=tile, capability=capability
    )
    kept = mask_IJ.ravel().astype(jnp.int32)
    return fold_vmap(launch_blocks)(x_MK[None], dy_MN[None], kept[None])[0]


def _multiply_rows(x, w_KN, mask_IJ, bias_N, *, transposed, tile, capability):
    """x w, or x w^T, plus the bias: each column of blocks has a list."""
    counts, entries = list_kept(mask_IJ if transposed else mask_IJ.T)
    launch_rows = functools.partial(
        _launch_rows, transposed=transposed, tile=tile, capability=capability
    )
    operands = jax.tree.map(lambda a: a[None], (x, w_KN, bias_N, counts, entries))
    return fold_vmap(launch_rows)(*operands)[0]


def _launch_rows(x, w, bias, counts, entries, *, transposed, tile: ProductTile, capability):
    # Imported where it is launched: kernels need the extra.
    from pallas_kernels.block_sparse_matmul.triton import kernels

    B = max(a.shape[0] for a in (x, w, counts, bias) if a is not None)
    (lists, num_lists, num_blocks), (K, N) = entries.shape, w.shape[1:]
    M, contracted = x.shape[1:]
    columns = K if transposed else N
    if bias is not None:
        bias = jnp.broadcast_to(bias, (B, N))
    results = launch(
        kernels.block_sparse_matmul_rows,
        {
            "x": x,
            "w": w,
            "bias": bias,
            "order": _start_longest_first(counts),
            "counts": counts,
            "entries": entries,
        },
        {"out": jax.ShapeDtypeStruct((B, M, columns), x.dtype)},
        {
            "B": B,
            "XB": x.shape[0],
            "WB": w.shape[0],
            "LB": lists,
            "M": M,
            "C": contracted,
            "N": columns,
            "U": num_lists,
            "P": num_blocks,
            "INNER": contracted // num_blocks,
            "OUTER": columns // num_lists,
            "INNER_STRIDE": 1 if transposed else N,
            "OUTER_STRIDE": N if transposed else 1,
            "BM": tile.rows,
            "BN": tile.columns,
            "BK": tile.depth,
            "GROUP": _GROUP,
            "BIAS": bias is not None,
        },
        programs=-(-M // tile.rows) * B * (columns // tile.columns),
        tile=tile,
        capability=capability,
        takes_all_registers=True,
    )
    return results["out"]


def _launch_blocks(x, dy, kept, *, grid, tile: ProductTile, capability):
    from pallas_kernels.block_sparse_matmul.triton import kernels

    B = max(a.shape[0] for a in (x, dy, kept))
    (M, K), N = x.shape[1:], dy.shape[2]
    results = launch(
        kernels.block_sparse_matmul_gradient,
        {"x": x, "dy": dy, "order": _start_longest_first(kept), "kept": kept},
        {"out": jax.ShapeDtypeStruct((B, K, N), x.dtype)},
        {
            "B": B,
            "XB": x.shape[0],
            "YB": dy.shape[0],
            "LB": kept.shape[0],
            "M": M,
            "C": K,
            "N": N,
            "J": grid[1],
            "U": grid[0] * grid[1],
            "INNER": K // grid[0],
            "OUTER": N // grid[1],
            "BM": tile.rows,
            "BN": tile.columns,
            "BK": tile.depth,
        },
        programs=B * (K // tile.rows) * (N // tile.columns),
        tile=tile,
        capability=capability,
        takes_all_registers=True,
    )
    return results["out"]


def _start_longest_first(counts: jax.Array) -> jax.Array:
    """Return int32, the places of lists in an order in which no long one is started late."""
    return jnp.argsort(-counts.reshape(-1), stable=True).astype(jnp.int32)
