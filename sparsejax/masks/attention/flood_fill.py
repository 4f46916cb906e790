"""SPION: block patterns by convolutional flood filling of attention maps.

An attention map becomes a block pattern in three steps, each usable on its own:

  attention [T, T] --sum along diagonals--> --mean per block--> pooled [I, J]
  pooled    [I, J] --greedy walks over blocks above a quantile--> kept [I, J]  (variants cf, f)
  pooled    [I, J] --the largest entries---------------------->   kept [I, J]  (variant c)

`NB` is the number of blocks per side, I = J = NB; leading axes (layers) are independent.
"""

import functools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

type Variant = Literal["cf", "c", "f"]
"""Convolution with flood fill, convolution with top-k, flood fill without convolution."""


@functools.partial(
    jax.jit,
    static_argnames=("block_size", "quantile", "filter_size", "variant", "density", "causal"),
)
def spion_pattern(
    attention: jax.Array,
    *,
    block_size: int,
    quantile: float,
    filter_size: int = 31,
    variant: Variant = "cf",
    density: float | None = None,
    causal: bool = False,
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
      quantile: share of pooled values at or below the threshold of the flood fill, in (0, 1);
        variant `"c"` does not use it.
      filter_size: positions in the diagonal convolution, odd; variant `"f"` does not use it.
      variant: "cf", "c" or "f".
      density: fraction of blocks that variant `"c"` asks for; None otherwise.
      causal: whether queries see only themselves and earlier positions (ours).

    Returns:
      bool[..., NB, NB], True = kept, with NB = T / block_size; the diagonal is always kept.

    Raises:
      ValueError: if the map is not square and floating, an option is out of range, the block
        size does not divide T, or `density` is missing for `"c"` or given for another variant.

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
    if variant != "c" and density is not None:
        raise ValueError(f"density must be None for variant={variant!r}, got density={density}")
    _check_quantile(quantile)
    pooled = pool_attention(
        attention,
        block_size=block_size,
        filter_size=None if variant == "f" else filter_size,
        causal=causal,
    )
    if density is not None:
        return top_k_blocks(pooled, density=density, causal=causal)
    return flood_fill(pooled, quantile=quantile, causal=causal)


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
    _check_square("attention", attention)
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


@functools.partial(jax.jit, static_argnames=("quantile", "causal"))
def flood_fill(pooled: jax.Array, *, quantile: float, causal: bool = False) -> jax.Array:
    """Keep the blocks above a quantile that greedy walks from the border visit.

    A walk starts at every block of the first row and of the first column. It moves to the largest
    of its three neighbours below, right and below-right until it leaves the grid; blocks outside
    the grid count as zero, and ties go to below-right, then to right. A visited block is kept if
    its value is strictly above the `quantile` of all values (interpolated linearly); the walk
    continues either way. The first block of a walk is not tested. Diagonal blocks are always kept.

    Without causality at most ceil((1 - quantile) (NB^2 - 1)) + NB blocks are kept. The walks look
    one block ahead and miss many: of the 41 blocks above the 0.96-quantile of a random 32 x 32 map
    they reach 25 on average. Where many values tie at the top, the quantile can equal the maximum,
    and only the diagonal is kept.

    The causal case is ours. Blocks above the diagonal are invisible: they count as zero, are never
    kept, and are left out of the quantile, where their zeros would make up half the values and a
    quantile of 0.96 would admit twice the share of visible blocks. A walk starts at the first
    *visible* block of every row and column, hence in the first column and on the diagonal: from the
    first row it would see only zeros and leave along the edge of the grid without entering the
    triangle. Values of diagonal blocks average over their invisible half too.

    Args:
      pooled: floating[..., NB, NB], non-negative block values; leading axes are layers.
      quantile: share of values at or below the threshold, in (0, 1).
      causal: whether only the lower triangle of blocks is visible (ours).

    Returns:
      bool[..., NB, NB], True = kept. A layer that holds a NaN keeps only its diagonal.

    Raises:
      ValueError: if the grid is not square and floating, or the quantile is not inside (0, 1).

    References:
      arXiv:2309.12578; where the text leaves the walk open we follow its released code.

    Example:
      >>> pooled = jnp.array([[0.0, 7, 0], [9, 0, 8], [1, 0, 0]])
      >>> flood_fill(pooled, quantile=0.5).astype(int)
      Array([[1, 0, 0],
             [1, 1, 1],
             [1, 0, 1]], dtype=int32)
    """
    _check_square("pooled", pooled)
    _check_quantile(quantile)
    num_blocks = pooled.shape[-1]
    visible = _visible_blocks(num_blocks, causal)
    pooled = jnp.where(visible, pooled, 0)
    threshold = _lerp_quantile(pooled[..., *np.nonzero(visible)], quantile)
    first_visible = (visible.cumsum(0) == 1) | (visible.cumsum(1) == 1)
    above = pooled > threshold[..., None, None]
    return _keep_diagonal(_walk(pooled, starts=visible & first_visible) & above)


@functools.partial(jax.jit, static_argnames=("density", "causal"))
def top_k_blocks(pooled: jax.Array, *, density: float, causal: bool = False) -> jax.Array:
    """Keep the largest blocks of each layer, then its diagonal.

    k = floor(density * visible - NB), where visible counts the visible blocks: NB^2, or
    NB (NB + 1) / 2 if causal (ours). Where the k largest include diagonal blocks the kept
    share is below `density`, as in the released code. Ties go to the earlier block in row order.

    Args:
      pooled: floating[..., NB, NB], block values; leading axes are layers.
      density: fraction of the visible blocks to keep; at least the diagonal's share.
      causal: whether only the lower triangle of blocks is visible (ours).

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
    _check_square("pooled", pooled)
    num_blocks = pooled.shape[-1]
    visible = _visible_blocks(num_blocks, causal)
    diagonal_share = num_blocks / visible.sum()
    if not diagonal_share <= density <= 1:
        raise ValueError(
            f"density must be at most 1 and at least {diagonal_share:.4g}, the share of the "
            f"diagonal blocks, got density={density}"
        )
    # At the diagonal's own share the difference may round to just below zero.
    num_largest = max(0, math.floor(visible.sum() * density - num_blocks))
    values = jnp.where(visible, pooled, -jnp.inf).reshape(*pooled.shape[:-2], num_blocks**2)
    _, largest = jax.lax.top_k(values, num_largest)
    kept = jnp.put_along_axis(jnp.zeros(values.shape, bool), largest, True, -1, inplace=False)
    kept &= ~jnp.isnan(values).any(-1, keepdims=True)
    return _keep_diagonal(kept.reshape(pooled.shape))


def _walk(pooled: jax.Array, *, starts: np.ndarray) -> jax.Array:
    """Return the blocks that the walks from `starts` move to.

    The next block depends only on the present one, so walks that meet stay together, and the set
    of present blocks is enough. At most 2 (NB - 1) moves stay within the grid.
    """
    num_blocks = pooled.shape[-1]
    bordered = _pad_last_two(pooled, (0, 1), (0, 1))
    down, right, diagonal = bordered[..., 1:, :-1], bordered[..., :-1, 1:], bordered[..., 1:, 1:]
    goes_down = (down > right) & (down > diagonal)
    goes_right = ~(down > right) & (right > diagonal)
    goes_diagonal = ~(goes_down | goes_right)

    def moved(present: jax.Array, rows: int, columns: int) -> jax.Array:
        return _pad_last_two(present, (rows, 0), (columns, 0))[..., :num_blocks, :num_blocks]

    def move(_, walks):
        present, reached = walks
        present = (
            moved(present & goes_down, 1, 0)
            | moved(present & goes_right, 0, 1)
            | moved(present & goes_diagonal, 1, 1)
        )
        return present, reached | present

    present = jnp.broadcast_to(starts, pooled.shape)
    _, reached = jax.lax.fori_loop(
        0, 2 * (num_blocks - 1), move, (present, jnp.zeros(pooled.shape, bool))
    )
    return reached


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


def _lerp_quantile(values: jax.Array, quantile: float) -> jax.Array:
    """Return the quantile over the last axis, NaN if it holds one.

    A strict comparison needs the quantile of equal values to be that value. The weighted sum of
    both neighbours, as in `jnp.quantile`, can round to below it; their difference cannot.
    """
    ordered = jnp.sort(values, axis=-1)
    position = quantile * (values.shape[-1] - 1)
    index = math.floor(position)
    fraction = position - index
    low, high = ordered[..., index], ordered[..., math.ceil(position)]
    if fraction < 0.5:
        threshold = low + fraction * (high - low)
    else:
        threshold = high - (1 - fraction) * (high - low)
    return jnp.where(jnp.isnan(ordered[..., -1]), jnp.nan, threshold)


def _pad_last_two(x: jax.Array, rows: tuple[int, int], columns: tuple[int, int]) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [rows, columns])


def _keep_diagonal(kept: jax.Array) -> jax.Array:
    return jnp.where(np.eye(kept.shape[-1], dtype=bool), True, kept)


def _visible_blocks(num_blocks: int, causal: bool) -> np.ndarray:
    everything = np.ones((num_blocks, num_blocks), bool)
    return np.tril(everything) if causal else everything


def _check_square(name: str, x: jax.Array) -> None:
    if x.ndim < 2 or x.shape[-1] != x.shape[-2] or x.shape[-1] == 0:
        raise ValueError(f"{name} must have two equal last axes, got {name}.shape={x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating, got {name}.dtype={x.dtype}")


def _check_quantile(quantile: float) -> None:
    if not 0 < quantile < 1:
        raise ValueError(f"quantile must be inside (0, 1), got quantile={quantile}")
