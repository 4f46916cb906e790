"""How much of the attention a block mask keeps."""

import jax
import jax.numpy as jnp


def block_density(mask: jax.Array, *, causal: bool = False) -> jax.Array:
    """Return the fraction of visible blocks that a block mask keeps.

    density = kept visible blocks / visible blocks

    Args:
      mask: bool[..., I, J], True = kept.
      causal: whether only the lower triangle of blocks (I = J) is visible.

    Returns:
      f32[...], one density per leading index.

    Raises:
      ValueError: if the mask is not boolean, has fewer than two axes or no blocks, or is
        causal without being square.

    Example:
      >>> block_density(jnp.array([[True, False], [True, True]]))
      Array(0.75, dtype=float32)
      >>> block_density(jnp.array([[True, False], [False, True]]), causal=True)
      Array(0.6666667, dtype=float32)
    """
    if mask.dtype != jnp.bool_:
        raise ValueError(f"mask must be boolean, got mask.dtype={mask.dtype}")
    if mask.ndim < 2 or 0 in mask.shape[-2:]:
        raise ValueError(f"mask must be [..., I, J] and hold blocks, got mask.shape={mask.shape}")
    if causal and mask.shape[-2] != mask.shape[-1]:
        raise ValueError(f"mask must be square if causal, got mask.shape={mask.shape}")
    if not causal:
        return mask.mean(axis=(-2, -1), dtype=jnp.float32)
    num_blocks = mask.shape[-1]
    kept = jnp.tril(mask).sum(axis=(-2, -1), dtype=jnp.float32)
    return kept / (num_blocks * (num_blocks + 1) // 2)
