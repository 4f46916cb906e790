"""How much the masks of weights change, and how much magnitude they keep."""

import jax
import jax.numpy as jnp

from sparsejax.types import PyTree


def flip_rate(old: jax.Array, new: jax.Array) -> jax.Array:
    """Return the fraction of entries that changed between two masks, per layer.

    r = |new xor old|_1 / D,  D entries of a matrix

    Args:
      old: bool[..., K, N], True = kept; leading axes are layers.
      new: bool[..., K, N], the same later.

    Returns:
      f32[...], one rate per leading index: 0 for equal masks, 1 for complements.

    Raises:
      ValueError: if a mask is not boolean, has fewer than two axes or is empty, or the shapes
        differ.

    Numerics:
      Counts are exact integers; the quotient is rounded once.

    References:
      Hu et al., FST, arXiv:2404.01847, definition of the flip rate.

    Example:
      >>> old = jnp.array([[True, True, False, False]])
      >>> flip_rate(old, jnp.array([[True, False, True, False]]))
      Array(0.5, dtype=float32)
    """
    return _count_flips(old, new) / (old.shape[-2] * old.shape[-1])


def total_flip_rate(old: PyTree, new: PyTree) -> jax.Array:
    """Return the fraction of entries that changed over all masks of a tree.

    r = sum over leaves |new xor old|_1 / sum over leaves D

    A large leaf weighs more than a small one, so this is not the mean of the layers' rates.

    Args:
      old: pytree of bool[..., K, N], True = kept; None for a leaf that is never sparse.
      new: pytree like `old`, the same later.

    Returns:
      f32[].

    Raises:
      ValueError: if the trees differ or hold no mask, or as `flip_rate`.

    Numerics:
      Counts of a matrix are exact integers, added in f32.

    References:
      As `flip_rate`.

    Example:
      >>> old = {"up": jnp.zeros((2, 4), bool), "down": jnp.zeros((6, 4), bool), "head": None}
      >>> total_flip_rate(old, old | {"up": jnp.ones((2, 4), bool)})
      Array(0.25, dtype=float32)
    """
    entries = sum(mask.size for mask in jax.tree.leaves(old))
    if not entries:
        raise ValueError("old must hold at least one mask")
    flips = jax.tree.map(lambda a, b: _count_flips(a, b).sum(), old, new)
    return jnp.stack(jax.tree.leaves(flips)).sum() / entries


def retained_l1(w: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the fraction of magnitude that a mask keeps, per layer.

    retained = sum |w| mask / sum |w|

    Args:
      w: floating[..., K, N]; leading axes are layers.
      mask: bool[..., K, N], True = kept.

    Returns:
      f32[...] (f64 for f64), one fraction per leading index; 1 where w is zero throughout.

    Raises:
      ValueError: if the mask is not boolean, has fewer than two axes or not the shape of w.

    Numerics:
      Sums in f32 at least, along N and then along K.

    Example:
      >>> retained_l1(jnp.array([[3.0, -1]]), jnp.array([[True, False]]))
      Array(0.75, dtype=float32)
    """
    _check_matrices("mask", mask, w.shape)
    magnitude = jnp.abs(w.astype(jnp.promote_types(w.dtype, jnp.float32)))
    kept, total = (x.sum(-1).sum(-1) for x in (jnp.where(mask, magnitude, 0), magnitude))
    return jnp.where(total == 0, 1, kept / jnp.where(total == 0, 1, total))


def _count_flips(old: jax.Array, new: jax.Array) -> jax.Array:
    _check_matrices("old", old, old.shape)
    _check_matrices("new", new, old.shape)
    # Integers: exact beyond 2^24 too, in whatever order the compiler adds.
    return (old != new).sum(axis=(-2, -1), dtype=jnp.int32).astype(jnp.float32)


def _check_matrices(name: str, mask: jax.Array, shape: tuple[int, ...]) -> None:
    if mask.dtype != jnp.bool_ or mask.ndim < 2 or 0 in mask.shape or mask.shape != shape:
        raise ValueError(
            f"{name} must be bool[..., K, N], hold entries and have shape {shape}, got "
            f"{mask.dtype}{list(mask.shape)}"
        )
