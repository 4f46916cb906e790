"""What a decoder keeps of the past, and attention from one new position to it.

Legend: B batch, S positions of the cache, N query heads, K key/value heads, G = N / K, H head dim,
I query blocks, J key blocks.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp


class ChosenBlocks(NamedTuple):
    """Blocks of one layer that were chosen from its input, and what the next are chosen from.

    Attributes:
      q_BSNH: float[B, S, N, H], queries by position.
      kept_BNIJ: bool[B, N, I, J], True = kept; of query blocks that have begun.
    """

    q_BSNH: jax.Array
    kept_BNIJ: jax.Array


class LayerCache(NamedTuple):
    """Keys and values of one layer by position; anything where there is no token yet.

    Attributes:
      k_BSKH: float[B, S, K, H], keys.
      v_BSKH: float[B, S, K, H], values.
      chosen: ChosenBlocks where blocks are chosen from the input, else None.
    """

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    chosen: ChosenBlocks | None


def pad_positions(x: jax.Array, length: int) -> jax.Array:
    """Append zeros along the axis of positions.

    Args:
      x: float[B, T, N, H].
      length: int, S.

    Returns:
      float[B, S, N, H].
    """
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))


def write_position(kept: jax.Array, new: jax.Array, positions_B: jax.Array) -> jax.Array:
    """Write one position of each example.

    Args:
      kept: float[B, S, N, H].
      new: float[B, 1, N, H].
      positions_B: i32[B], below S.

    Returns:
      Array like `kept`.
    """
    rows = jnp.arange(len(positions_B))
    return kept.at[rows, positions_B].set(new[:, 0].astype(kept.dtype))


def choose_next_rows(
    chosen: ChosenBlocks,
    k_BSKH: jax.Array,
    positions_B: jax.Array,
    choose: Callable[[jax.Array, jax.Array], jax.Array],
    block_q: int,
) -> ChosenBlocks:
    """Choose the blocks of the query blocks that begin at a position.

    Args:
      chosen: with queries up to the positions.
      k_BSKH: float[B, S, K, H], keys up to the positions.
      positions_B: i32[B].
      choose: (float[B, S, N, H], float[B, S, K, H]) -> bool[B, N, I, J], see `BlockChooser`.
      block_q: int, positions of a query block.

    Returns:
      ChosenBlocks. All are chosen anew where one query block begins, and the new ones taken over.
    """
    begins_B = positions_B % block_q == 0

    def renew():
        kept_BNIJ = choose(chosen.q_BSNH, k_BSKH)
        is_new_BI = positions_B[:, None] // block_q == jnp.arange(kept_BNIJ.shape[2])[None]
        is_new_BI &= begins_B[:, None]
        return jnp.where(is_new_BI[:, None, :, None], kept_BNIJ, chosen.kept_BNIJ)

    return chosen._replace(kept_BNIJ=jax.lax.cond(begins_B.any(), renew, lambda: chosen.kept_BNIJ))


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
    visible_BNS = (jnp.arange(S)[None] <= positions_B[:, None])[:, None]
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
