"""SPION: block patterns by convolutional flood filling of attention maps.

An attention map becomes a block pattern in three steps, each usable on its own:

  attention [T, T] --sum along diagonals--> --mean per block--> pooled [I, J]
  pooled    [I, J] --walks over blocks above a quantile-------> kept [I, J]  (variants cf, f)
  pooled    [I, J] --the largest entries---------------------->  kept [I, J]  (variant c)

`NB` is the number of blocks per side, I = J = NB; leading axes (layers) are independent.
"""

import functools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from sparsejax.masks.attention.block_grids import (
    check_square,
    count_at_density,
    keep_diagonal,
    keep_largest,
    keep_largest_beside_diagonal,
    visible_blocks,
    visible_values,
)
from sparsejax.masks.attention.flood_fill import Walk, check_quantile, flood_fill

type Variant = Literal["cf", "c", "f"]
"""Convolution with flood fill, convolution with top-k, flood fill without convolution."""


@functools.partial(
    jax.jit,
    static_argnames=(
        "block_size",
        "quantile",
        "filter_size",
        "variant",
        "density",
        "causal",
        "walk",
    ),
)
def spion_pattern(
    attention: jax.Array,
    *,
    block_size: int,
    quantile: float | None = None,
    filter_size: int = 31,
    variant: Variant = "cf",
    density: float | None = None,
    causal: bool = False,
    walk: Walk | None = None,
) -> jax.Array:
    """Find the block-sparse attention pattern of each layer from its attention map.

    The paper's variants: `"cf"` is `pool_attention` followed by `flood_fill`, `"f"` is the same
    without the diagonal convolution, `"c"` is `pool_attention` followed by `top_k_blocks`. The map
    is the softmax output averaged over batch and heads, so one pattern serves all heads of a layer.
    The rules follow the paper's released code.

    The paper has no causal case. `causal=True` is our extension, see `flood_fill`: positions
    above the diagonal are ignored, and so are blocks above the diagonal.

    A layer whose map holds a NaN keeps only its diagonal blocks.

    Args:
      attention: floating[..., T, T], non-negative attention maps; leading axes are layers.
      block_size: positions per block side; divides T.
      quantile: as `flood_fill`; variant `"c"` does not use it.
      filter_size: positions in the diagonal convolution, odd; variant `"f"` does not use it.
      variant: "cf", "c" or "f".
      density: of variant `"c"`, as `top_k_blocks`; of the others, as `flood_fill` (ours).
      causal: whether queries see only themselves and earlier positions (ours).
      walk: as `flood_fill`; variant `"c"` does not use it.

    Returns:
      bool[..., NB, NB], True = kept, with NB = T / block_size; the diagonal is always kept.

    Raises:
      ValueError: if the map is not square and floating, an option is out of range, the block
        size does not divide T, `density` is missing for `"c"`, or another variant has not exactly
        one of `quantile` and `density`.

    References:
      Yoon, Han, Moon: SPION: Layer-Wise Sparse Training of Transformer via Convolutional
      Flood Filling, arXiv:2309.12578.

    Example:
      >>> attention = jnp.eye(8) + jnp.eye(8, k=-4)
      >>> spion_pattern(attention, block_size=2, quantile=0.5, filter_size=3).astype(int)
      Array([[1, 0, 0, 0],
             [0, 1, 0, 0],
             [0, 0, 1, 0],
             [0, 1, 0, 1]], dtype=int32)
    """
    if variant not in get_args(Variant.__value__):
        raise ValueError(f"variant must be 'cf', 'c' or 'f', got variant={variant!r}")
    if variant == "c" and density is None:
        raise ValueError("density must be given for variant='c', got density=None")
    if quantile is not None:
        check_quantile(quantile)
    pooled = pool_attention(
        attention,
        block_size=block_size,
        filter_size=None if variant == "f" else filter_size,
        causal=causal,
    )
    if variant == "c" and density is not None:
        return top_k_blocks(pooled, density=density, causal=causal)
    return flood_fill(pooled, quantile=quantile, density=density, causal=causal, walk=walk)


@functools.partial(jax.jit, static_argnames=("block_size", "filter_size", "causal"))
def pool_attention(
    attention: jax.Array,
    *,
    block_size: int,
    filter_size: int | None,
    causal: bool = False,
) -> jax.Array:
    """Sum an attention map along its diagonals, then average it over blocks.

    conv[t, s] = sum_{|k| <= filter_size // 2} attention[t + k, s + k], zero outside the map
    pooled[i, j] = mean of conv over the positions of block (i, j)

    One row of blocks is convolved at a time, so that the temporary memory grows with T and
    not with T^2.

    Args:
      attention: floating[..., T, T], attention maps.
      block_size: positions per block side; divides T.
      filter_size: terms of the diagonal sum, odd; None leaves the convolution out.
      causal: whether positions above the diagonal count as zero (ours).

    Returns:
      f32[..., NB, NB] with NB = T / block_size (f64 for an f64 map).

    Raises:
      ValueError: if the map is not square and floating, the block size does not divide T, or
        the filter size is not odd and positive.

    Numerics:
      Accumulates in f32 at least, by additions only: the relative error of a non-negative map
      is that of a short sum.

    References:
      arXiv:2309.12578, the convolution and average pooling of SPION.

    Example:
      >>> pool_attention(jnp.eye(4), block_size=2, filter_size=3)
      Array([[1.25, 0.  ],
             [0.  , 1.25]], dtype=float32)
    """
    check_square("attention", attention)
    length = attention.shape[-1]
    if block_size < 1 or length % block_size:
        raise ValueError(
            "block_size must be positive and divide the sequence length, got "
            f"block_size={block_size} for length={length}"
        )
    if filter_size is not None and (filter_size < 1 or filter_size % 2 == 0):
        raise ValueError(f"filter_size must be odd and positive, got filter_size={filter_size}")
    terms = filter_size or 1
    reach = terms // 2
    num_blocks = length // block_size
    dtype = jnp.promote_types(attention.dtype, jnp.float32)

    def pool_block_row(block_row: jax.Array) -> jax.Array:
        rows = block_row * block_size - reach + jnp.arange(block_size + terms - 1)
        strip = attention.at[..., rows, :].get(
            mode="fill", fill_value=0, wrap_negative_indices=False
        )
        if causal:
            strip = jnp.where(rows[:, None] >= jnp.arange(length)[None], strip, 0)
        strip = _pad_last_two(strip.astype(dtype), (0, 0), (reach, reach))
        convolved = _sum_along_diagonal(strip, terms)
        blocks = convolved.reshape(*convolved.shape[:-1], num_blocks, block_size)
        return blocks.mean(axis=(-3, -1))

    return jnp.moveaxis(jax.lax.map(pool_block_row, jnp.arange(num_blocks)), 0, -2)


@functools.partial(jax.jit, static_argnames=("density", "causal", "exact"))
def top_k_blocks(
    pooled: jax.Array, *, density: float, causal: bool = False, exact: bool = False
) -> jax.Array:
    """Keep the largest blocks of each layer, then its diagonal.

    k = floor(density * visible - NB), where visible counts the visible blocks: NB^2, or
    NB (NB + 1) / 2 if causal (ours). Where the k largest include diagonal blocks the kept
    share is below `density`, as in the released code. Ties go to the earlier block in row order.

    Args:
      pooled: floating[..., NB, NB], block values; leading axes are layers, or layers and heads.
      density: fraction of the visible blocks to keep; at least the diagonal's share.
      causal: whether only the lower triangle of blocks is visible (ours).
      exact: keep exactly round(density * visible) blocks, the diagonal and the largest beside it
        (ours).

    Returns:
      bool[..., NB, NB], True = kept. A layer that holds a NaN keeps only its diagonal.

    Raises:
      ValueError: if the grid is not square and floating, or the density is above 1 or less
        than the diagonal takes.

    References:
      arXiv:2309.12578, variant SPION-C, as in its released code.

    Example:
      >>> top_k_blocks(jnp.array([[1.0, 4], [3, 2]]), density=0.75).astype(int)
      Array([[1, 1],
             [0, 1]], dtype=int32)
    """
    check_square("pooled", pooled)
    num_blocks = pooled.shape[-1]
    visible = visible_blocks(num_blocks, causal=causal)
    values = visible_values(pooled, visible)
    num_kept = count_at_density(density, visible)
    if exact:
        return keep_largest_beside_diagonal(values, num_kept)
    # At the diagonal's own share the difference may round to just below zero.
    num_largest = max(0, math.floor(visible.sum() * density - num_blocks))
    return keep_diagonal(keep_largest(values, num_largest))


def _sum_along_diagonal(x: jax.Array, terms: int) -> jax.Array:
    """Return sum_{k < terms} x[..., i + k, j + k] in about 2 log2(terms) additions."""
    if terms == 1:
        return x
    half = terms // 2
    sums = _sum_along_diagonal(x, half)
    sums = sums[..., :-half, :-half] + sums[..., half:, half:]
    if terms % 2:
        sums = sums[..., :-1, :-1] + x[..., terms - 1 :, terms - 1 :]
    return sums


def _pad_last_two(x: jax.Array, rows: tuple[int, int], columns: tuple[int, int]) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [rows, columns])
