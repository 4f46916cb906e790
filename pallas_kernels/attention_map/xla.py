"""The mean softmax map on any device, a few rows at a time.

Legend: as everywhere (`sparsejax.types`), and G = N / K query heads of a key head, R rows held.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.attention_map.call import MapArrays, MapFacts
from pallas_kernels.dispatch import targets_gpu

# Rows held at once, of all heads. On a CPU they stay in a cache. A GPU starts a few kernels for
# them: 64 MB take longer to read than that (13 us at 4.8 TB/s), 8 MB do not.
_MAP_BYTES = 8_000_000
_GPU_MAP_BYTES = 64_000_000


def run(arrays: MapArrays, facts: MapFacts) -> jax.Array:
    """Average the maps of all heads, a few rows at a time.

    A = 1/(B N) sum_bn exp(q_bn k_bn^T / sqrt(H) - lse_bn)

    Whatever B and N, only as many rows are held at once as fit in 8 MB, 64 MB on a GPU (or one):
    the map of every head together would not fit a GPU, and rows that stay in a cache are computed
    faster.

    Returns:
      f32[T, S].

    Numerics:
      Scores, softmax and sums are f32.
    """
    q_BTNH, k_BSKH, kv_mask_BS, lse = arrays
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    held_bytes = _GPU_MAP_BYTES if targets_gpu() else _MAP_BYTES
    most = max(1, held_bytes // (4 * B * N * S))
    rows = max(r for r in range(1, T + 1) if T % r == 0 and r <= most)
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)

    def average_rows(start):
        q_BRKGH = jax.lax.dynamic_slice_in_dim(q_BTKGH, start, rows, axis=1)
        scores_BKGRS = jnp.einsum(
            "BRKGH,BSKH->BKGRS", q_BRKGH, k_BSKH, preferred_element_type=jnp.float32
        )
        scores_BKGRS *= H**-0.5
        visible = None
        if facts.causal:
            visible = jnp.arange(S)[None] <= start + jnp.arange(rows)[:, None]
            visible = visible[None, None, None]
        if kv_mask_BS is not None:
            real_B111S = kv_mask_BS[:, None, None, None]
            visible = real_B111S if visible is None else real_B111S & visible
        if visible is not None:
            scores_BKGRS = jnp.where(visible, scores_BKGRS, -jnp.inf)
        if lse is not None:
            lse_BRN = jax.lax.dynamic_slice_in_dim(lse, start, rows, axis=1)
            lse_BKGR = lse_BRN.reshape(B, rows, K, N // K).transpose(0, 2, 3, 1)
            lse_BKGR = jnp.where(lse_BKGR > -jnp.inf, lse_BKGR, jnp.inf)
            return jnp.exp(scores_BKGRS - lse_BKGR[..., None]).mean((0, 1, 2))
        top = scores_BKGRS.max(axis=-1, keepdims=True)
        weights_BKGRS = jnp.exp(scores_BKGRS - jnp.where(jnp.isfinite(top), top, 0.0))
        total_BKGR = weights_BKGRS.sum(axis=-1)
        share_BKGR = jnp.where(total_BKGR > 0, 1 / total_BKGR, 0.0) / (B * N)
        return jnp.einsum(
            "BKGRS,BKGR->RS", weights_BKGRS, share_BKGR, precision=jax.lax.Precision.HIGHEST
        )

    return jax.lax.map(average_rows, jnp.arange(0, T, rows)).reshape(T, S)
