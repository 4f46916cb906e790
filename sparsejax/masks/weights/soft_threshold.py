"""2:4 sparsity as a continuous function of the weights (S-STE).

The two largest magnitudes of each group of four are shrunk by the third largest; the other two
become zero. Values swap order only at zero, so the function has no jump, unlike a mask.
"""

import functools

import jax
import jax.numpy as jnp

from sparsejax.masks.weights.magnitude import split_groups


def soft_threshold(w: jax.Array, *, axis: int) -> jax.Array:
    """Shrink weights so that at most two of four remain.

    S(w)_i = sign(w_i) max(|w_i| - t, 0),  t = second-smallest magnitude in the group of i

    S moves by at most twice the largest change in a group's weights. A group that holds a NaN is
    NaN.

    Args:
      w: floating[...], the axis in groups of four consecutive entries.
      axis: the contracted axis, along which groups lie; -2 in x w with stacked w[L, K, N].

    Returns:
      Like w; at most two of each group are not zero.

    Raises:
      ValueError: if w is not floating or lacks the axis, or four does not divide the axis.

    Numerics:
      One subtraction in the dtype of w.

    References:
      Hu, Zhu, Chen: S-STE, arXiv:2409.09099.

    Example:
      >>> soft_threshold(jnp.array([1.0, -4, 2, 3]), axis=0)
      Array([ 0., -2.,  0.,  1.], dtype=float32)
    """
    groups, threshold = _split_and_threshold(w, axis)
    # sign(w) max(|w| - t, 0), without negative zeros.
    return (groups - jnp.clip(groups, -threshold, threshold)).reshape(w.shape)


def soft_threshold_mask(w: jax.Array, *, axis: int) -> jax.Array:
    """Return where `soft_threshold` is not zero.

    mask_i = |w_i| > t,  t = second-smallest magnitude in the group of i

    Where magnitudes tie at t, fewer than two of four are kept, and none if all four are equal: the
    values are zero either way. `magnitude_nm_mask` keeps the same entries and fills up to two.

    Args:
      w: floating[...], the axis in groups of four consecutive entries.
      axis: the axis along which groups lie.

    Returns:
      bool, shape of w, True = kept; at most two of each group, none of a group with a NaN.

    Raises:
      ValueError: as `soft_threshold`.

    Example:
      >>> soft_threshold_mask(jnp.array([1.0, -4, 2, 3, 5, 5, 5, 0]), axis=0).astype(int)
      Array([0, 1, 0, 1, 0, 0, 0, 0], dtype=int32)
    """
    groups, threshold = _split_and_threshold(w, axis)
    return (jnp.abs(groups) > threshold).reshape(w.shape)


def soft_threshold_scale(w: jax.Array, *, axis: int) -> jax.Array:
    """Return the factor that undoes the shrinking on average, one per matrix.

    beta = <w, S(w)> / <S(w), S(w)>, the minimum of |w - beta S(w)|^2

    Compute it once, from the initial weights, and keep it: recomputed, it grows during training.
    For Gaussian weights of any scale it is 1.4837.

    Args:
      w: floating[..., K, N]; leading axes are layers.
      axis: the axis along which groups of four lie.

    Returns:
      f32[...] (f64 for f64), one factor per leading index; 1 where S(w) is zero throughout.

    Raises:
      ValueError: if w has fewer than two axes, or as `soft_threshold`.

    Numerics:
      Sums in f32 at least, along N and then along K.

    References:
      Hu, Zhu, Chen: S-STE, arXiv:2409.09099.

    Example:
      >>> soft_threshold_scale(jnp.array([[1.0, -4, 2, 3]]), axis=1)
      Array(2.2, dtype=float32)
    """
    if w.ndim < 2:
        raise ValueError(f"w must be [..., K, N], got w.shape={w.shape}")
    w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
    shrunk = soft_threshold(w, axis=axis)
    product, square = ((x * shrunk).sum(-1).sum(-1) for x in (w, shrunk))
    return jnp.where(square == 0, 1, product / jnp.where(square == 0, 1, square))


def soft_threshold_ste(w: jax.Array, beta: jax.typing.ArrayLike, *, axis: int) -> jax.Array:
    """Shrink and rescale weights; pass the gradient straight through.

    y = beta S(w),  dw = dy,  dbeta = 0

    The gradient reaches all weights, unscaled: beta is not applied to it.

    Args:
      w: floating[..., K, N]; leading axes are layers.
      beta: floating[] or floating[...], `soft_threshold_scale` of the initial weights.
      axis: the axis along which groups of four lie.

    Returns:
      Like w.

    Raises:
      ValueError: if beta is neither a scalar nor one per leading index, or as `soft_threshold`.

    Numerics:
      The product with beta is rounded once, to the dtype of w.

    References:
      Hu, Zhu, Chen: S-STE, arXiv:2409.09099; the gradient is that of the released code.

    Example:
      >>> w = jnp.array([[1.0, -4, 2, 3]])
      >>> soft_threshold_ste(w, 2.0, axis=1)
      Array([[ 0., -4.,  0.,  2.]], dtype=float32)
      >>> jax.grad(lambda w: soft_threshold_ste(w, 2.0, axis=1).sum())(w)
      Array([[1., 1., 1., 1.]], dtype=float32)
    """
    beta = jnp.asarray(beta)
    if beta.shape not in ((), w.shape[:-2]):
        raise ValueError(
            f"beta must be a scalar or {list(w.shape[:-2])}, one per leading index of w, got "
            f"beta.shape={beta.shape} for w.shape={w.shape}"
        )
    return _scaled_soft_threshold(w, beta, axis)


# Not w + stop_gradient(y - w): rounding would leave small numbers in place of the zeros.
@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _scaled_soft_threshold(w, beta, axis):
    return (beta[..., None, None] * soft_threshold(w, axis=axis)).astype(w.dtype)


@_scaled_soft_threshold.defjvp
def _pass_straight_through(axis, primals, tangents):
    return _scaled_soft_threshold(*primals, axis), tangents[0]


def _split_and_threshold(w: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"w must be floating, got w.dtype={w.dtype}")
    groups, axis = split_groups(w, m=4, axis=axis)
    a, b, c, d = (jax.lax.slice_in_dim(jnp.abs(groups), i, i + 1, axis=axis) for i in range(4))
    # The larger of the pairs' minima, unless a whole pair lies below it.
    second_smallest = jnp.minimum(
        jnp.maximum(jnp.minimum(a, b), jnp.minimum(c, d)),
        jnp.minimum(jnp.maximum(a, b), jnp.maximum(c, d)),
    )
    return groups, second_smallest
