"""The mask of one weight: made, pruned and updated as its pattern asks.

Unstructured masks choose single weights, block masks whole blocks by their sum of magnitudes, n:m
masks weights within each group of m.

Legend: K rows and N columns of a weight, I x J its mask: K x N, or the grid of its blocks.
"""

import jax
import jax.numpy as jnp

from sparsejax.masks import (
    block_scores,
    count_kept,
    drop_and_grow,
    drop_and_grow_nm,
    magnitude_mask,
    magnitude_nm_mask,
    random_mask,
    update_counts,
)
from sparsejax.masks.weights.topology import Growth
from sparsejax.patterns import NMPattern, WeightBlocks, WeightPattern


def init_mask(
    pattern: WeightPattern,
    mask: jax.Array,
    weight: jax.Array,
    *,
    density: jax.Array,
    key: jax.Array | None,
) -> jax.Array:
    """Return the first mask of a weight.

    Args:
      pattern: of the weight.
      mask: bool[I, J], read for its shape.
      weight: float[K, N], compared by magnitude.
      density: f32[], fraction kept; n:m keeps its own.
      key: typed key to keep entries at random; None keeps the largest.

    Returns:
      bool[I, J], True = kept.
    """
    if isinstance(pattern, NMPattern):
        scores = weight if key is None else jax.random.uniform(key, mask.shape, jnp.float32)
        return magnitude_nm_mask(scores, n=pattern.n, m=pattern.m, axis=-2)
    count = count_kept(mask.size, density)
    if key is None:
        return magnitude_mask(_score(pattern, weight), count)
    return random_mask(key, mask.shape, count)


def prune_mask(
    pattern: WeightPattern, mask: jax.Array, weight: jax.Array, *, density: jax.Array
) -> jax.Array:
    """Return the mask without its smallest entries.

    Args:
      pattern: of the weight, not n:m.
      mask: bool[I, J], True = kept.
      weight: float[K, N], compared by magnitude.
      density: f32[], fraction kept afterwards.

    Returns:
      bool[I, J], True = kept.
    """
    count = count_kept(mask.size, density)
    return magnitude_mask(_score(pattern, weight), count, among=mask)


def update_mask(
    pattern: WeightPattern,
    mask: jax.Array,
    weight: jax.Array,
    grad: jax.Array | None,
    *,
    density: jax.Array,
    update_fraction: jax.Array,
    growth: Growth,
    mix: int,
    key: jax.Array,
) -> jax.Array:
    """Return the mask after it dropped its smallest entries and grew others.

    Args:
      pattern: of the weight.
      mask: bool[I, J], True = kept.
      weight: float[K, N], compared by magnitude.
      grad: float[K, N] of all weights; None if growth does not read it.
      density: f32[], fraction kept afterwards; n:m keeps its own.
      update_fraction: f32[], fraction of the kept entries to replace.
      growth: how entries to grow are chosen, see `drop_and_grow`.
      mix: of "mixed" growth.
      key: typed key of random growth.

    Returns:
      bool[I, J], True = kept.
    """
    num_drop, num_grow = update_counts(
        mask.sum(dtype=jnp.int32),
        size=mask.size,
        density=pattern.n / pattern.m if isinstance(pattern, NMPattern) else density,
        update_fraction=update_fraction,
    )
    shared = {
        "weight": _score(pattern, weight),
        "grad": None if grad is None else _score(pattern, grad),
        "num_drop": num_drop,
        "growth": growth,
        "mix": mix,
        "key": key,
    }
    if isinstance(pattern, NMPattern):
        return drop_and_grow_nm(mask, n=pattern.n, m=pattern.m, **shared)
    return drop_and_grow(mask, num_grow=num_grow, **shared)


def _score(pattern: WeightPattern, x: jax.Array) -> jax.Array:
    if isinstance(pattern, WeightBlocks):
        return block_scores(x, (pattern.rows, pattern.columns))
    return x
