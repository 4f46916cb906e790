"""The averaged softmax map a few rows at a time, in plain JAX.

Letters: B T S N K H as everywhere (`sparsejax.types`); R rows at a time, G query heads of a key
head.
"""

import jax
import jax.numpy as jnp

_MAP_BYTES = 8_000_000


def mean_attention_map_xla(
    q_BTNH: jax.Array, k_BSKH: jax.Array, kv_mask_BS: jax.Array | None, *, causal: bool
) -> jax.Array:
    """Average the softmax maps, holding as many rows at once as fit in 8 MB, or one.

    The maps of every head together would not fit a GPU, and rows that stay in a cache are computed
    faster.

    Args:
      q_BTNH: float[B, T, N, H].
      k_BSKH: float[B, S, K, H], K divides N.
      kv_mask_BS: bool[B, S] or None.
      causal: bool.

    Returns:
      f32[T, S].
    """
    B, T, N, _ = q_BTNH.shape

    def average_rows(scores_BKGRS):
        top = scores_BKGRS.max(axis=-1, keepdims=True)
        weights_BKGRS = jnp.exp(scores_BKGRS - jnp.where(jnp.isfinite(top), top, 0.0))
        total_BKGR = weights_BKGRS.sum(axis=-1)
        share_BKGR = jnp.where(total_BKGR > 0, 1 / total_BKGR, 0.0) / (B * N)
        return jnp.einsum(
            "BKGRS,BKGR->RS", weights_BKGRS, share_BKGR, precision=jax.lax.Precision.HIGHEST
        )

    rows_XRS = _map_rows(average_rows, q_BTNH, k_BSKH, kv_mask_BS, causal=causal)
    return rows_XRS.reshape(T, k_BSKH.shape[1])


def log_sum_exp(
    q_BTNH: jax.Array, k_BSKH: jax.Array, kv_mask_BS: jax.Array | None, *, causal: bool
) -> jax.Array:
    """Return the logarithm of every query's softmax denominator, by the same rows.

    Args:
      q_BTNH: float[B, T, N, H].
      k_BSKH: float[B, S, K, H], K divides N.
      kv_mask_BS: bool[B, S] or None.
      causal: bool.

    Returns:
      f32[B, T, N]; -inf where a query sees no key.
    """
    B, T, N, _ = q_BTNH.shape
    lse_XBKGR = _map_rows(
        lambda scores_BKGRS: jax.nn.logsumexp(scores_BKGRS, axis=-1),
        *(q_BTNH, k_BSKH, kv_mask_BS),
        causal=causal,
    )
    return jnp.moveaxis(lse_XBKGR, 0, -2).reshape(B, N, T).swapaxes(1, 2)


def _map_rows(function, q_BTNH, k_BSKH, kv_mask_BS, *, causal):
    """Apply a function to the logits of some rows, -inf where a key is not seen, after another."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    most = max(1, _MAP_BYTES // (4 * B * N * S))
    rows = max(r for r in range(1, T + 1) if T % r == 0 and r <= most)
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)

    def apply(start):
        q_BRKGH = jax.lax.dynamic_slice_in_dim(q_BTKGH, start, rows, axis=1)
        scores_BKGRS = jnp.einsum(
            "BRKGH,BSKH->BKGRS", q_BRKGH, k_BSKH, preferred_element_type=jnp.float32
        )
        scores_BKGRS *= H**-0.5
        visible = None
        if causal:
            visible = jnp.arange(S) <= start + jnp.arange(rows)[:, None]
        if kv_mask_BS is not None:
            real_B111S = kv_mask_BS[:, None, None, None]
            visible = real_B111S if visible is None else real_B111S & visible
        if visible is not None:
            scores_BKGRS = jnp.where(visible, scores_BKGRS, -jnp.inf)
        return function(scores_BKGRS)

    return jax.lax.map(apply, jnp.arange(0, T, rows))
