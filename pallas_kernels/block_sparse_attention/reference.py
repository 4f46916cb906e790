"""Block-sparse attention as its equation, in f32: the oracle for values and gradients.

Letters: B T S N K H I J as everywhere (`sparsejax.types`).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.call import AttentionArrays, AttentionFacts, make_mask


def run(arrays: AttentionArrays, facts: AttentionFacts) -> tuple[jax.Array, jax.Array]:
    """Attend to the kept blocks, writing out every logit.

    s = scale q k^T,  Z_t = sum_kept exp(s_ts) [+ number of pruned positions],
    out_t = sum_kept exp(s_ts) v_s / Z_t,  lse_t = log Z_t

    The bracket belongs to `pruned_logits="zero"`. Gradients are those of plain JAX. Removed keys
    may hold anything here.

    Returns:
      tuple of out, shaped and typed like q, and lse f32[B, T, N].

    References:
      SPION, arXiv:2309.12578, and SAT, doi:10.1109/ACCESS.2024.3425638, for "zero": the rule of
      the published kernels, in which a pruned position counts even if `kv_mask` removes its key.
    """
    q, k, v, _, kv_mask, segment_ids = arrays
    num_queries, num_keys = facts.num_queries, facts.num_keys
    group = facts.num_heads // facts.num_kv_heads
    if kv_mask is not None:
        k, v = (jnp.where(kv_mask[:, :, None, None], x, 0) for x in (k, v))
    k_BSNH, v_BSNH = (jnp.repeat(x.astype(jnp.float32), group, axis=2) for x in (k, v))

    mask = make_mask(arrays)
    if mask is None:
        mask = jnp.ones((1, 1, num_queries // facts.block_q, num_keys // facts.block_kv), bool)
    kept = jnp.repeat(jnp.repeat(mask, facts.block_q, axis=2), facts.block_kv, axis=3)
    visible = jnp.ones((1, 1, num_queries, num_keys), bool)
    if facts.causal:
        visible = jnp.tril(visible)
    if segment_ids is not None:
        visible &= (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    attended = kept & visible
    if kv_mask is not None:
        attended &= kv_mask[:, None, None, :]

    s = jnp.einsum("btnh,bsnh->bnts", q.astype(jnp.float32), k_BSNH, precision="highest")
    s = s * facts.scale
    s = jnp.where(attended, s, -jnp.inf)
    num_zeros = jnp.zeros((1, 1, 1), jnp.int32)
    if facts.pruned_logits == "zero":
        num_zeros = (visible & ~kept).sum(axis=-1, dtype=jnp.int32)
    top = jnp.maximum(s.max(axis=-1), jnp.where(num_zeros > 0, 0.0, -jnp.inf))
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    e = jnp.exp(s - top[..., None])
    # Where zeros count, top >= 0. Elsewhere exp(-top) may be infinite, and 0 * inf is NaN.
    total = e.sum(axis=-1) + num_zeros * jnp.exp(-jnp.maximum(top, 0.0))
    # A row without logits has total 0; the inner `where` keeps its derivative finite too.
    some = total > 0
    total = jnp.where(some, total, 1.0)
    out = jnp.einsum("bnts,bsnh->btnh", e / total[..., None], v_BSNH, precision="highest")
    lse = jnp.where(some, top + jnp.log(total), -jnp.inf)
    return out.astype(q.dtype), lse.swapaxes(1, 2)
