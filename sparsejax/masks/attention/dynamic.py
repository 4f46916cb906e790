"""Attention blocks chosen for each input and head from cheap scores of its queries and keys.

A query block's own queries are not known before its tokens are. In a causal model its blocks are
chosen from the first query of the block and from queries before it: `R` of them, sampled. Their
exact attention to every key before the block, summed by key block, is the score.

Legend: B batch, T query position, S key position, N query heads, K key/value heads, G = N / K,
H head dim, I query blocks, J key blocks, R sampled queries of a query block.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def count_row_blocks(num_blocks: int, *, density: float, causal: bool) -> np.ndarray:
    """Say how many blocks each query block keeps, alike for all that have as many to choose from.

    A causal query block i keeps min(i + 1, c), with the largest c that the density allows; of what
    is left, one each goes to the last query blocks. A shorter input has the first of the counts.

    Args:
      num_blocks: int, I = J.
      density: float in (0, 1], share of the visible blocks.
      causal: bool, query block i sees i + 1 blocks.

    Returns:
      int[I], whose sum is the share of the visible blocks, rounded.

    Raises:
      ValueError: if that is less than one block for each query block.

    Example:
      >>> count_row_blocks(8, density=0.5, causal=True)
      array([1, 2, 2, 2, 2, 3, 3, 3])
    """
    visible = np.arange(1, num_blocks + 1) if causal else np.full(num_blocks, num_blocks)
    total = round(density * int(visible.sum()))
    if not num_blocks <= total <= visible.sum():
        raise ValueError(
            f"density={density} must keep at least one of {num_blocks} blocks for each query block "
            f"and at most all {visible.sum()}, got {total}"
        )
    most = max(c for c in range(1, num_blocks + 1) if np.minimum(visible, c).sum() <= total)
    counts = np.minimum(visible, most)
    rest = total - int(counts.sum())
    if rest:
        counts[num_blocks - rest :] += 1
    return counts


def sample_queries(
    row_BI: jax.Array, *, block_size: int, num_queries: int, lookahead: bool
) -> jax.Array:
    """Return the positions of the queries that stand for each query block.

    In the causal form these are the first position of the block and `num_queries` - 1 before it;
    with `lookahead` they lie evenly within the block.

    Args:
      row_BI: i32[B, I], query blocks.
      block_size: int, positions of a block.
      num_queries: int, R.
      lookahead: bool, static.

    Returns:
      i32[B, I, R]; what would lie before the first position is the first.
    """
    first_BI1 = row_BI[..., None] * block_size
    if lookahead:
        step = block_size / num_queries
        offsets = np.asarray([int(step * (r + 0.5)) for r in range(num_queries)])
        return first_BI1 + offsets
    return jnp.maximum(first_BI1 - np.arange(num_queries), 0)


def score_blocks(
    q_BIRNH: jax.Array,
    k_BSKH: jax.Array,
    positions_BIR: jax.Array,
    kv_mask_BS: jax.Array | None,
    *,
    block_size: int,
    causal: bool,
) -> jax.Array:
    """Compute the attention of sampled queries to every key block, averaged over the queries.

    score[i, j] = mean_r sum_(s in block j) softmax_s(q_r k_s / sqrt(H))

    Args:
      q_BIRNH: float[B, I, R, N, H], the sampled queries.
      k_BSKH: float[B, S, K, H].
      positions_BIR: i32[B, I, R], of the queries: in a causal model they see keys up to there.
      kv_mask_BS: bool[B, S], True = real token; None = all.
      block_size: int, positions of a key block.
      causal: bool, static.

    Returns:
      f32[B, N, I, J].

    Numerics:
      Products in the type of the queries, summed in f32; softmax in f32.
    """
    B, I, R, N, H = q_BIRNH.shape
    S, K = k_BSKH.shape[1:3]
    q = q_BIRNH.reshape(B, I, R, K, N // K, H)
    scores = jnp.einsum("birkgh,bskh->bkgirs", q, k_BSKH, preferred_element_type=jnp.float32)
    scores_BNIRS = scores.reshape(B, N, I, R, S) / math.sqrt(H)
    seen = jnp.ones((1, 1, 1, 1, S), bool)
    if causal:
        seen = (jnp.arange(S) <= positions_BIR[..., None])[:, None]
    if kv_mask_BS is not None:
        seen = seen & kv_mask_BS[:, None, None, None]
    # Where no key is seen, every score is the lowest finite one, and the shares are even.
    shares = jax.nn.softmax(jnp.where(seen, scores_BNIRS, jnp.finfo(jnp.float32).min), axis=-1)
    return shares.reshape(B, N, I, R, -1, block_size).sum(-1).mean(3)


def keep_top_blocks(
    scores_BNIJ: jax.Array,
    counts_NI: np.ndarray | jax.Array,
    *,
    always_BIJ: jax.Array,
    visible_BIJ: jax.Array,
    most: int,
    shared: bool,
) -> jax.Array:
    """Keep the highest scores of each query block, an exact number of them.

    Args:
      scores_BNIJ: f32[B, N, I, J], finite.
      counts_NI: int[N | 1, I], blocks that a head keeps of a query block.
      always_BIJ: bool[B | 1, I, J], kept whatever their scores; no more than the counts.
      visible_BIJ: bool[B | 1, I, J], what may be kept.
      most: int, the largest count.
      shared: bool, static; the heads share the sum of their counts, which goes to the highest
        scores of all heads together.

    Returns:
      bool[B, N, I, J]; of equal scores the first head, then the first block, is kept.
    """
    B, N, I, J = scores_BNIJ.shape
    scores = jnp.where(always_BIJ[:, None], jnp.inf, scores_BNIJ)
    scores = jnp.where(visible_BIJ[:, None], scores, -jnp.inf)
    counts = jnp.broadcast_to(jnp.asarray(counts_NI), (N, I))
    if shared:
        scores = scores.swapaxes(1, 2).reshape(B, I, N * J)
        counts, most = counts.sum(0), N * most
    highest, chosen = jax.lax.top_k(scores, min(most, scores.shape[-1]))
    taken = (jnp.arange(chosen.shape[-1]) < counts[..., None]) & (highest > -jnp.inf)
    # One more column takes what is not chosen.
    chosen = jnp.where(taken, chosen, scores.shape[-1])
    rows = jnp.zeros((*scores.shape[:-1], scores.shape[-1] + 1), bool)
    kept = jnp.put_along_axis(rows, chosen, True, axis=-1, inplace=False)[..., :-1]
    return kept.reshape(B, I, N, J).swapaxes(1, 2) if shared else kept
