"""The mean softmax map as its equation, in f32: the oracle.

Letters: B T S N K H as everywhere (`sparsejax.types`).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.attention_map.call import MapArrays, MapFacts


def run(arrays: MapArrays, facts: MapFacts) -> jax.Array:
    """Average the maps of all heads, writing out every one.

    A = 1/(B N) sum_bn exp(s_bn - lse_bn),  s = q k^T / sqrt(H),  lse_t = log sum_s exp(s_ts)

    Returns:
      f32[T, S].
    """
    q_BTNH, k_BSKH, kv_mask_BS, lse = arrays
    k_BSNH = jnp.repeat(k_BSKH, q_BTNH.shape[2] // k_BSKH.shape[2], axis=2)
    s_BNTS = jnp.einsum(
        "BTNH,BSNH->BNTS",
        q_BTNH.astype(jnp.float32),
        k_BSNH.astype(jnp.float32),
        precision="highest",
    )
    s_BNTS /= q_BTNH.shape[3] ** 0.5
    visible = jnp.ones((1, 1, *s_BNTS.shape[2:]), bool)
    if facts.causal:
        visible = jnp.tril(visible)
    if kv_mask_BS is not None:
        visible &= kv_mask_BS[:, None, None, :]
    s_BNTS = jnp.where(visible, s_BNTS, -jnp.inf)
    lse_BNT = jax.nn.logsumexp(s_BNTS, axis=-1) if lse is None else lse.swapaxes(1, 2)
    # A row that sees nothing has lse -inf, and a map of 0.
    lse_BNT = jnp.where(lse_BNT > -jnp.inf, lse_BNT, jnp.inf)
    return jnp.exp(s_BNTS - lse_BNT[..., None]).mean((0, 1))
