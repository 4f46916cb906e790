"""What a decoder keeps of the past, and attention from one new position to it.

Legend: B batch, S positions of the cache, N query heads, K key/value heads, G = N / K, H head dim.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp


class LayerCache(NamedTuple):
    """Keys and values of one layer by position; zeros where there is no token yet.

    Attributes:
      k_BSKH, v_BSKH: float[B, S, K, H].
      q_BSNH: float[B, S, N, H] where blocks are chosen from queries, else None.
    """

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    q_BSNH: jax.Array | None


def make_layer_cache(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, length: int, *, keeps_queries: bool
) -> LayerCache:
    """Keep what a prompt has made.

    Args:
      q_BTNH: float[B, T, N, H].
      k_BTKH: float[B, T, K, H].
      v_BTKH: like k.
      length: int, S.
      keeps_queries: bool, static.

    Returns:
      LayerCache of S positions, the first T from the prompt.
    """

    def pad(x):
        return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))

    return LayerCache(pad(k_BTKH), pad(v_BTKH), pad(q_BTNH) if keeps_queries else None)


def extend_cache(
    cache: LayerCache,
    q_B1NH: jax.Array,
    k_B1KH: jax.Array,
    v_B1KH: jax.Array,
    positions_B: jax.Array,
) -> LayerCache:
    """Write one position of each example.

    Args:
      cache: LayerCache.
      q_B1NH: float[B, 1, N, H].
      k_B1KH: float[B, 1, K, H].
      v_B1KH: like k.
      positions_B: i32[B], below S.

    Returns:
      LayerCache.
    """
    rows = jnp.arange(len(positions_B))

    def write(kept, new):
        return kept.at[rows, positions_B].set(new[:, 0].astype(kept.dtype))

    q_BSNH = None if cache.q_BSNH is None else write(cache.q_BSNH, q_B1NH)
    return LayerCache(write(cache.k_BSKH, k_B1KH), write(cache.v_BSKH, v_B1KH), q_BSNH)


def attend_one(
    q_BNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    positions_B: jax.Array,
    kept_BNS: jax.Array | None,
    *,
    pruned_logits: Literal["masked", "zero"],
) -> jax.Array:
    """Attend from one position of each example, as `block_sparse_attention` does from all.

    Args:
      q_BNH: float[B, N, H].
      k_BSKH: float[B, S, K, H].
      v_BSKH: like k.
      positions_B: i32[B], of the queries: what lies after them is not seen.
      kept_BNS: bool[B, 1|N, S], True = kept; None = all.
      pruned_logits: "masked" or "zero": visible positions that are pruned have logit 0 and no
        value.

    Returns:
      float[B, N, H]; 0 where nothing is kept.

    Numerics:
      Scores and softmax in f32.
    """
    B, N, H = q_BNH.shape
    K, S = k_BSKH.shape[2], k_BSKH.shape[1]
    q_BKGH = q_BNH.reshape(B, K, N // K, H)
    scores_BNS = jnp.einsum("bkgh,bskh->bkgs", q_BKGH, k_BSKH, preferred_element_type=jnp.float32)
    scores_BNS = scores_BNS.reshape(B, N, S) / math.sqrt(H)
    visible_BNS = (jnp.arange(S) <= positions_B[:, None])[:, None]
    kept_BNS = visible_BNS if kept_BNS is None else visible_BNS & kept_BNS
    counted_BNS = visible_BNS if pruned_logits == "zero" else kept_BNS
    scores_BNS = jnp.where(kept_BNS, scores_BNS, 0.0)
    highest_BN1 = jnp.max(scores_BNS, -1, keepdims=True, where=counted_BNS, initial=-jnp.inf)
    highest_BN1 = jnp.where(jnp.isfinite(highest_BN1), highest_BN1, 0.0)
    weights_BNS = jnp.where(counted_BNS, jnp.exp(scores_BNS - highest_BN1), 0.0)
    total_BN1 = weights_BNS.sum(-1, keepdims=True)
    weights_BNS = jnp.where(kept_BNS, weights_BNS / jnp.maximum(total_BN1, 1e-37), 0.0)
    y_BKGH = jnp.einsum(
        "bkgs,bskh->bkgh", weights_BNS.reshape(B, K, N // K, S).astype(v_BSKH.dtype), v_BSKH
    )
    return y_BKGH.reshape(B, N, H).astype(q_BNH.dtype)
