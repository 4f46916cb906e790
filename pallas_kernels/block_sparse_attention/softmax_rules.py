"""The "zero" softmax rule: pruned positions keep their place in the denominator as logits of 0."""

import jax
import jax.numpy as jnp


def count_visible(
    num_queries: int, num_keys: int, *, causal: bool, segment_ids: jax.Array | None
) -> jax.Array:
    """Count the keys each query could attend to if no block were pruned.

    Keys removed by a key mask count as well, as in the published kernels. Memory and work grow
    with the length (times its logarithm for segments), never with its square.

    Args:
      num_queries: int, T.
      num_keys: int, S; equal to T if there are segments.
      causal: bool, query t sees keys 0..t.
      segment_ids: int[B, T] or None, queries see keys of their own segment.

    Returns:
      int32[B or 1, T], visible keys per query.

    Example:
      >>> count_visible(3, 3, causal=True, segment_ids=None).tolist()
      [[1, 2, 3]]
      >>> count_visible(3, 3, causal=True, segment_ids=jnp.array([[7, 7, 5]])).tolist()
      [[1, 2, 1]]
    """
    if segment_ids is None:
        if not causal:
            return jnp.full((1, num_queries), num_keys, jnp.int32)
        return jnp.minimum(jnp.arange(num_queries) + 1, num_keys)[None].astype(jnp.int32)

    def count_row(ids):
        ordered = jnp.sort(ids)
        first = jnp.searchsorted(ordered, ids, side="left")
        if not causal:
            return jnp.searchsorted(ordered, ids, side="right") - first
        rank = jnp.argsort(jnp.argsort(ids, stable=True))
        return rank - first + 1

    return jax.vmap(count_row)(segment_ids).astype(jnp.int32)


def add_zero_logits(
    out: jax.Array, lse: jax.Array, num_zero_logits: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Extend a finished softmax by positions of logit 0 and value 0.

    lse' = log(exp(lse) + n),  out' = out * exp(lse - lse')

    Args:
      out: f32[..., H], attention over the kept positions; 0 where there are none.
      lse: f32[...], its log-sum-exp; -inf where there are none.
      num_zero_logits: int[...], n, positions to add; may be 0.

    Returns:
      tuple (out', lse') shaped like `out` and `lse`; differentiable everywhere.

    Example:
      >>> out, lse = add_zero_logits(jnp.ones((1, 2)), jnp.zeros(1), jnp.array([3]))
      >>> out.tolist(), round(float(jnp.exp(lse[0])), 4)
      ([[0.25, 0.25]], 4.0)
    """
    # Where there is nothing to combine, a harmless stand-in keeps inf - inf out of values and
    # derivatives alike.
    has_kept = lse > -jnp.inf
    has_zeros = num_zero_logits > 0
    kept = jnp.where(has_kept, lse, 0.0)
    zeros = jnp.log(jnp.maximum(num_zero_logits, 1).astype(lse.dtype))
    both = jnp.logaddexp(kept, zeros)
    total = jnp.where(has_zeros, jnp.where(has_kept, both, zeros), lse)
    shrink = jnp.where(has_kept & has_zeros, jnp.exp(kept - both), 1.0)
    return out * shrink[..., None], total
