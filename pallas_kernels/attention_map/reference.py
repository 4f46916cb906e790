"""The averaged softmax map as its equation, in f32, with the map of every head in memory.

Letters: B T S N K H as everywhere (`sparsejax.types`).
"""

import jax
import jax.numpy as jnp


def mean_attention_map_reference(
    q_BTNH: jax.Array, k_BSKH: jax.Array, kv_mask_BS: jax.Array | None, *, causal: bool
) -> jax.Array:
    """Average the softmax maps of all examples and heads.

    Args:
      q_BTNH: float[B, T, N, H].
      k_BSKH: float[B, S, K, H], K divides N.
      kv_mask_BS: bool[B, S] or None.
      causal: bool.

    Returns:
      f32[T, S].
    """
    q_BTNH = q_BTNH.astype(jnp.float32)
    k_BSNH = jnp.repeat(k_BSKH.astype(jnp.float32), q_BTNH.shape[2] // k_BSKH.shape[2], axis=2)
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, precision="highest")
    scores_BNTS *= q_BTNH.shape[3] ** -0.5
    visible_BNTS = jnp.ones(scores_BNTS.shape, bool)
    if causal:
        visible_BNTS = jnp.tril(visible_BNTS)
    if kv_mask_BS is not None:
        visible_BNTS &= kv_mask_BS[:, None, None]
    map_BNTS = jax.nn.softmax(scores_BNTS, where=visible_BNTS)
    return jnp.where(visible_BNTS, map_BNTS, 0.0).mean((0, 1))
