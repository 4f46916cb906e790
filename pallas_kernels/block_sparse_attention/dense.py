"""Dense attention: every logit is computed, pruned blocks are masked away.

What a dense training phase runs, and the baseline that sparsity has to beat. Without a block mask
it is JAX's own attention. Memory grows with the square of the length.

Letters: B T S N K H I J as everywhere (`sparsejax.types`); G query heads of a key head.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.call import AttentionArrays, AttentionFacts, make_mask
from pallas_kernels.block_sparse_attention.softmax_rules import add_zero_logits, count_visible


def suits(facts: AttentionFacts) -> bool:
    """Return whether there are no blocks to skip: every one is kept, or each is one position."""
    return facts.mask_shape is None or facts.block_q == facts.block_kv == 1


def run(arrays: AttentionArrays, facts: AttentionFacts) -> tuple[jax.Array, jax.Array | None]:
    """Compute attention over all blocks and mask the pruned ones.

    Returns:
      tuple of out, shaped and typed like q, and lse f32[B, T, N] or None.

    Numerics:
      Products accumulate in f32; softmax is f32; probabilities are rounded to the dtype of the
      inputs before they meet the values.
    """
    q, k, v, _, kv_mask, segment_ids = arrays
    mask, causal, scale = make_mask(arrays), facts.causal, facts.scale
    plain = mask is None and kv_mask is None and segment_ids is None
    if plain and not facts.return_lse:
        return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=causal), None

    batch, num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    group = num_heads // num_kv_heads
    attended = _attended(arrays, facts, mask, kv_mask)

    q_BTKGH = q.reshape(batch, num_queries, num_kv_heads, group, head_dim)
    s = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k, preferred_element_type=jnp.float32)
    s = s.reshape(batch, num_heads, num_queries, num_keys) * scale
    s = jnp.where(attended, s, -jnp.inf)
    some = attended.any(axis=-1)
    top = jax.lax.stop_gradient(jnp.where(some, s.max(axis=-1), 0.0))
    e = jnp.exp(s - top[..., None])
    total = jnp.where(some, e.sum(axis=-1), 1.0)
    p = (e / total[..., None]).astype(v.dtype)
    p = p.reshape(batch, num_kv_heads, group, num_queries, num_keys)
    out = jnp.einsum("bkgts,bskh->btkgh", p, v, preferred_element_type=jnp.float32)
    out = out.reshape(q.shape)
    lse = jnp.where(some, top + jnp.log(total), -jnp.inf).swapaxes(1, 2)
    if facts.pruned_logits == "zero" and mask is not None:
        visible_BT = count_visible(num_queries, num_keys, causal=causal, segment_ids=segment_ids)
        kept = _attended(arrays, facts, mask, None).sum(axis=-1)
        out, lse = add_zero_logits(out, lse, visible_BT[..., None] - kept.swapaxes(1, 2))
    return out.astype(q.dtype), lse


def _attended(arrays, facts, mask, kv_mask):
    """bool[B or 1, N or 1, T, S], True where a logit enters the softmax."""
    attended = jnp.ones((1, 1, facts.num_queries, facts.num_keys), bool)
    if mask is not None:
        attended &= jnp.repeat(jnp.repeat(mask, facts.block_q, axis=2), facts.block_kv, axis=3)
    if facts.causal:
        attended = jnp.tril(attended)
    segment_ids = arrays.segment_ids
    if segment_ids is not None:
        attended &= (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    if kv_mask is not None:
        attended &= kv_mask[:, None, None, :]
    return attended
