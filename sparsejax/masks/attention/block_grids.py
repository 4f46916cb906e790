"""Selections of blocks on a square grid of them.

`NB` is the number of blocks per side; leading axes (layers, heads) are independent.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def check_square(name: str, x: jax.Array) -> None:
    """Refuse an array that is no floating grid.

    Args:
      name: of the argument.
      x: floating[..., NB, NB], expected.

    Raises:
      ValueError: with its shape or type.
    """
    if x.ndim < 2 or x.shape[-1] != x.shape[-2] or x.shape[-1] == 0:
        raise ValueError(f"{name} must have two equal last axes, got {name}.shape={x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating, got {name}.dtype={x.dtype}")


def visible_blocks(num_blocks: int, *, causal: bool) -> np.ndarray:
    """Return where queries see keys: everywhere, or on and below the diagonal if causal.

    Returns:
      bool[NB, NB], True = visible.
    """
    everything = np.ones((num_blocks, num_blocks), bool)
    return np.tril(everything) if causal else everything


def count_at_density(density: float, visible: np.ndarray) -> int:
    """Return how many blocks a density of the visible ones is: round(density * visible).

    Args:
      density: from the share of the diagonal, whose blocks are always kept, to 1.
      visible: bool[NB, NB].

    Raises:
      ValueError: if the density is out of range.
    """
    num_blocks, num_visible = len(visible), int(visible.sum())
    count = math.floor(density * num_visible + 0.5) if 0 < density <= 1 else 0
    if count < num_blocks:
        raise ValueError(
            f"density must be at most 1 and at least {num_blocks / num_visible:.4g}, the share of "
            f"the diagonal blocks, got density={density}"
        )
    return count


def keep_diagonal(kept: jax.Array) -> jax.Array:
    """Keep the diagonal beside what is kept.

    Args:
      kept: bool[..., NB, NB].

    Returns:
      bool[..., NB, NB].
    """
    return jnp.where(np.eye(kept.shape[-1], dtype=bool), True, kept)


def visible_values(pooled: jax.Array, visible: np.ndarray) -> jax.Array:
    """Return the values of visible blocks, -inf elsewhere and in a layer that holds a NaN.

    Args:
      pooled: floating[..., NB, NB].
      visible: bool[NB, NB].

    Returns:
      floating[..., NB, NB].
    """
    values = jnp.where(visible, pooled, -jnp.inf)
    return jnp.where(jnp.isnan(values).any((-2, -1), keepdims=True), -jnp.inf, values)


def keep_largest(values: jax.Array, count: int) -> jax.Array:
    """Keep the largest values.

    Args:
      values: floating[..., NB, NB], -inf where nothing may be kept.
      count: blocks to keep.

    Returns:
      bool[..., NB, NB], True = kept: `count` blocks, or all that may be. Ties go to the earlier
      block in row order.
    """
    flat = values.reshape(*values.shape[:-2], values.shape[-1] ** 2)
    _, largest = jax.lax.top_k(flat, count)
    kept = jnp.put_along_axis(jnp.zeros(flat.shape, bool), largest, True, -1, inplace=False)
    return (kept & (flat > -jnp.inf)).reshape(values.shape)


def keep_largest_beside_diagonal(values: jax.Array, count: int) -> jax.Array:
    """Keep the diagonal, and the largest values beside it, as `keep_largest`.

    Args:
      values: floating[..., NB, NB], -inf where nothing may be kept beside the diagonal.
      count: blocks to keep, the diagonal included.

    Returns:
      bool[..., NB, NB], True = kept.
    """
    diagonal = np.eye(values.shape[-1], dtype=bool)
    beside = jnp.where(diagonal, -jnp.inf, values)
    return keep_diagonal(keep_largest(beside, count - len(diagonal)))
