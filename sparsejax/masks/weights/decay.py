"""The decay of pruned weights."""

import jax
import jax.numpy as jnp

from sparsejax.types import PyTree


def masked_decay(w: PyTree, mask: PyTree, rate: jax.typing.ArrayLike) -> PyTree:
    """Return the decay of pruned weights, a pull towards zero to add to a gradient.

    d = rate (1 - mask) w

    FST adds it after clipping and before the optimizer, SR-STE in the backward pass
    (`decay_in_backward`). Adam divides it like the gradient, so its strength follows the size of
    the gradient. d is exactly zero where the mask keeps, whatever w holds there.

    Args:
      w: floating[...], or a pytree of them.
      mask: bool[...], True = kept, shape of w; or a pytree like w with None for a leaf that is
        never sparse.
      rate: f32[], lambda_W, per step; a traced value does not recompile.

    Returns:
      Like w; all zero for a leaf whose mask is None.

    Raises:
      ValueError: if a mask is not boolean or not shaped like its weight, or the trees differ.

    References:
      Hu et al., FST, arXiv:2404.01847, masked decay. SR-STE: Zhou et al., arXiv:2102.04010.

    Example:
      >>> masked_decay(jnp.array([2.0, -3]), jnp.array([True, False]), 0.5)
      Array([ 0. , -1.5], dtype=float32)
    """
    return jax.tree.map(
        lambda mask, w: _decay(w, mask, rate), mask, w, is_leaf=lambda leaf: leaf is None
    )


@jax.custom_vjp
def decay_in_backward(w: jax.Array, mask: jax.Array, rate: jax.typing.ArrayLike) -> jax.Array:
    """Return w, whose gradient gets the decay of pruned weights.

    f(w) = w,  dw = df + rate (1 - mask) w

    Args:
      w: floating[...].
      mask: bool[...], True = kept, shape of w.
      rate: f32[], lambda_W, per step; a traced value does not recompile.

    Returns:
      w.

    References:
      SR-STE: Zhou et al., arXiv:2102.04010, as in the released code, which does not clip.

    Example:
      >>> mask = jnp.array([True, False])
      >>> jax.grad(lambda w: decay_in_backward(w, mask, 0.5).sum())(jnp.array([2.0, -3]))
      Array([ 1. , -0.5], dtype=float32)
    """
    del mask, rate
    return w


def _decay_fwd(w, mask, rate):
    return w, masked_decay(w, mask, rate)


def _decay_bwd(decay, d_out):
    return d_out + decay, None, None


decay_in_backward.defvjp(_decay_fwd, _decay_bwd)


def _decay(w, mask, rate):
    if mask is None:
        return jnp.zeros_like(w)
    if mask.dtype != jnp.bool_ or mask.shape != w.shape:
        raise ValueError(f"mask must be bool{list(w.shape)}, got {mask.dtype}{list(mask.shape)}")
    return jnp.where(mask, 0, rate * w).astype(w.dtype)
