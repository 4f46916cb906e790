"""N:M masks along one axis: the largest n of every m consecutive weights."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames=("n", "m", "axis"))
def magnitude_nm_mask(w: jax.Array, *, n: int = 2, m: int = 4, axis: int) -> jax.Array:
    """Keep the n weights of largest magnitude in every group of m along an axis.

    mask_i = #{j in the group of i : |w_j| > |w_i|, or |w_j| = |w_i| and j < i} < n

    Ties keep the earlier entry. NaN counts as infinite, so that it shows in the product instead of
    being masked away.

    Args:
      w: floating[...], the axis in groups of m consecutive entries; other axes are independent.
      n: entries kept of each group, 1 <= n <= m.
      m: entries of a group; divides the axis.
      axis: the axis along which groups lie; -2 contracts in x w with stacked w[L, K, N].

    Returns:
      bool, shape of w, True = kept; exactly n in every group.

    Raises:
      ValueError: if w is not floating or lacks the axis, n and m are not as described, or m does
        not divide the axis.

    References:
      Mishra et al., arXiv:2104.08378; Zhou et al., SR-STE, arXiv:2102.04010.

    Example:
      >>> magnitude_nm_mask(jnp.array([1.0, -4, 2, 3, 5, 5, 5, 0]), axis=0).astype(int)
      Array([0, 1, 0, 1, 1, 1, 0, 0], dtype=int32)
    """
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"w must be floating, got w.dtype={w.dtype}")
    if not 1 <= n <= m:
        raise ValueError(f"n and m must be 1 <= n <= m, got n={n}, m={m}")
    groups, axis = split_groups(w, m=m, axis=axis)
    magnitude = jnp.where(jnp.isnan(groups), jnp.inf, jnp.abs(groups))
    return (rank_along(magnitude, axis) < n).reshape(w.shape)


def rank_along(x: jax.Array, axis: int) -> jax.Array:
    """Return the rank of each entry along a short axis: 0 for the largest.

    Args:
      x: number[...], without NaN; of equal entries the earlier comes first.

    Returns:
      i32, shape of x.

    Example:
      >>> rank_along(jnp.array([1, 4, 4, 2]), 0)
      Array([3, 0, 1, 2], dtype=int32)
    """
    position = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
    rank = jnp.zeros(x.shape, jnp.int32)
    for j in range(x.shape[axis]):
        other = jax.lax.slice_in_dim(x, j, j + 1, axis=axis)
        rank += (other > x) | ((other == x) & (j < position))
    return rank


def split_groups(w: jax.Array, *, m: int, axis: int) -> tuple[jax.Array, int]:
    """Give every group of m consecutive entries an axis of its own.

    Args:
      w: array.
      m: entries of a group; divides the axis.
      axis: the axis along which groups lie.

    Returns:
      The array with `axis` split into groups and entries, and the index of the entries' axis.

    Raises:
      ValueError: if w lacks the axis or m does not divide it.

    Example:
      >>> groups, entries = split_groups(jnp.zeros((8, 3)), m=4, axis=0)
      >>> groups.shape, entries
      ((2, 4, 3), 1)
    """
    if not -w.ndim <= axis < w.ndim:
        raise ValueError(f"axis must be an axis of w, got axis={axis} for w.shape={w.shape}")
    axis %= w.ndim
    if w.shape[axis] % m:
        raise ValueError(
            f"m must divide the axis of w, got m={m}, axis={axis} for w.shape={w.shape}"
        )
    shape = (*w.shape[:axis], w.shape[axis] // m, m, *w.shape[axis + 1 :])
    return w.reshape(shape), axis + 1
