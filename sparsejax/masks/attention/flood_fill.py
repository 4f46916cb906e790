"""Flood filling: the blocks of a pooled attention map that walks from its border visit.

`NB` is the number of blocks per side; leading axes (layers) are independent.
"""

import functools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.masks.attention.block_grids import (
    check_square,
    count_at_density,
    keep_diagonal,
    keep_largest_beside_diagonal,
    visible_blocks,
    visible_values,
)
from sparsejax.masks.attention.density import block_density
from sparsejax.masks.attention.walks import find_flood_levels, walk_greedily

type Walk = Literal["greedy", "flood"]
"""To the largest neighbour, as published; to every neighbour above the threshold, ours."""


@functools.partial(jax.jit, static_argnames=("quantile", "density", "causal", "walk"))
def flood_fill(
    pooled: jax.Array,
    *,
    quantile: float | None = None,
    density: float | None = None,
    causal: bool = False,
    walk: Walk | None = None,
) -> jax.Array:
    """Keep the blocks above a quantile that walks from the border visit.

    A walk starts at every block of the first row and of the first column and moves down, right or
    down and right until it leaves the grid. A visited block is kept if its value is strictly above
    the `quantile` of all values (interpolated linearly). Diagonal blocks are always kept.

    `"greedy"`, the published walk, moves to the largest of its three neighbours, above the quantile
    or not; blocks outside the grid count as zero, and ties go to below-right, then to right. The
    first block of a walk is not tested. Where it goes does not depend on the quantile, and most
    blocks lie on no walk: of the 41 blocks above the 0.96-quantile of a random 32 x 32 map 25 are
    reached on average. At most ceil((1 - quantile) (NB^2 - 1)) + NB blocks are kept. Where many
    values tie at the top, the quantile can equal the maximum, and only the diagonal is kept.

    `"flood"` is ours. It moves to every neighbour that is above the quantile, and tests first
    blocks too: a block is kept if moves over kept blocks lead to it from the border. The lower the
    quantile the more it keeps, down to every block. `flood_reach` says how far each gets.

    The causal case is ours. Blocks above the diagonal are invisible: they count as zero, are never
    kept, and are left out of the quantile, where their zeros would make up half the values and a
    quantile of 0.96 would admit twice the share of visible blocks. A walk starts at the first
    *visible* block of every row and column, hence in the first column and on the diagonal: from the
    first row it would see only zeros and leave along the edge of the grid without entering the
    triangle. Values of diagonal blocks average over their invisible half too. Greedy walks fail
    here: the next diagonal block is larger than the one below, so that walks from the diagonal
    never leave it, and those of the first column stay where the attention sink is, or join them.
    Together they visit some 4 / NB of the triangle.

    Args:
      pooled: floating[..., NB, NB], non-negative block values; leading axes are layers.
      quantile: share of values at or below the threshold, in (0, 1); None if `density` is given.
      density: fraction of the visible blocks to keep instead, at least the diagonal's share (ours).
        The quantile is chosen to keep exactly round(density * visible) blocks, the diagonal
        included, or all that walks visit where those are fewer; of equal values, or of blocks that
        others connect, the earlier in row order.
      causal: whether only the lower triangle of blocks is visible (ours).
      walk: "greedy" or "flood"; None is the former, or the latter if causal.

    Returns:
      bool[..., NB, NB], True = kept. A layer that holds a NaN keeps only its diagonal.

    Raises:
      ValueError: if the grid is not square and floating, not exactly one of `quantile` and
        `density` is given, either is out of range, or the walk is unknown.

    References:
      arXiv:2309.12578; where the text leaves the walk open we follow its released code.

    Example:
      >>> pooled = jnp.array([[0.0, 7, 0], [9, 0, 8], [1, 0, 0]])
      >>> flood_fill(pooled, quantile=0.5).astype(int)
      Array([[1, 0, 0],
             [1, 1, 1],
             [1, 0, 1]], dtype=int32)
      >>> flood_fill(pooled, quantile=0.5, walk="flood").astype(int)
      Array([[1, 1, 0],
             [1, 1, 1],
             [1, 0, 1]], dtype=int32)
    """
    check_square("pooled", pooled)
    if (quantile is None) == (density is None):
        raise ValueError(f"give either quantile or density, got {quantile=} and {density=}")
    visible = visible_blocks(pooled.shape[-1], causal=causal)
    levels = _find_levels(pooled, visible, choose_walk(walk, causal=causal))
    if density is not None:
        return keep_largest_beside_diagonal(levels, count_at_density(density, visible))
    assert quantile is not None
    check_quantile(quantile)
    threshold = _lerp_quantile(pooled[..., *np.nonzero(visible)], quantile)
    return keep_diagonal(levels > threshold[..., None, None])


@functools.partial(jax.jit, static_argnames=("causal", "walk"))
def flood_reach(pooled: jax.Array, *, causal: bool = False, walk: Walk | None = None) -> jax.Array:
    """Return the share of visible blocks that walks visit, or that lie on the diagonal.

    It is the most that `flood_fill` keeps at any quantile or density.

    Args:
      pooled: as `flood_fill`.
      causal: as `flood_fill`.
      walk: as `flood_fill`.

    Returns:
      f32[...], one share per leading index.

    Raises:
      ValueError: if the grid is not square and floating, or the walk is unknown.

    Example:
      >>> pooled = jnp.array([[5.0, 0, 0], [4, 5, 0], [3, 2, 5]])
      >>> flood_reach(pooled, causal=True, walk="greedy")
      Array(0.6666667, dtype=float32)
    """
    check_square("pooled", pooled)
    visible = visible_blocks(pooled.shape[-1], causal=causal)
    levels = _find_levels(pooled, visible, choose_walk(walk, causal=causal))
    return block_density(keep_diagonal(levels > -jnp.inf), causal=causal)


def choose_walk(walk: Walk | None, *, causal: bool) -> Walk:
    """Return the walk that `flood_fill` takes: the one named, or the default.

    Raises:
      ValueError: if the walk is unknown.

    Example:
      >>> choose_walk(None, causal=False), choose_walk(None, causal=True)
      ('greedy', 'flood')
    """
    if walk is None:
        return "flood" if causal else "greedy"
    if walk not in get_args(Walk.__value__):
        raise ValueError(f"walk must be 'greedy', 'flood' or None, got walk={walk!r}")
    return walk


def _find_levels(pooled: jax.Array, visible: np.ndarray, walk: Walk) -> jax.Array:
    """Return the value below which a threshold lets a walk keep a block, -inf if none does."""
    values = visible_values(pooled, visible)
    starts = visible & ((visible.cumsum(0) == 1) | (visible.cumsum(1) == 1))
    if walk == "flood":
        return find_flood_levels(values, starts=starts)
    visited = walk_greedily(jnp.where(visible, pooled, 0), starts=starts)
    return jnp.where(visited, values, -jnp.inf)


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


def check_quantile(quantile: float) -> None:
    """Refuse a quantile that is not inside (0, 1).

    Raises:
      ValueError: with the quantile.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"quantile must be inside (0, 1), got quantile={quantile}")
