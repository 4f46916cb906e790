"""Which share of their attention sampled queries give to each key block.

Legend: B batch, S key position, N query heads, K key/value heads, H head dim, I query blocks,
J key blocks, R sampled queries of a query block.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def sample_queries(
    num_blocks: int, *, block_size: int, num_queries: int, within: bool
) -> np.ndarray:
    """Return the positions of the queries that stand for each query block.

    Args:
      num_blocks: int, I.
      block_size: int, positions of a block.
      num_queries: int, R.
      within: bool, they lie evenly within the block; otherwise they are the first position of the
        block and those before it.

    Returns:
      int[I, R]; what would lie before the first position is the first.

    Example:
      >>> sample_queries(2, block_size=8, num_queries=2, within=True).tolist()
      [[2, 6], [10, 14]]
      >>> sample_queries(2, block_size=8, num_queries=2, within=False).tolist()
      [[0, 0], [8, 7]]
    """
    first_I1, order_R = block_size * np.arange(num_blocks)[:, None], np.arange(num_queries)
    if within:
        return first_I1 + (block_size * (2 * order_R + 1)) // (2 * num_queries)
    return np.maximum(first_I1 - order_R, 0)


def compute_shares(
    q_BIRNH: jax.Array,
    k_BSKH: jax.Array,
    positions_IR: np.ndarray | jax.Array,
    kv_mask_BS: jax.Array | None,
    *,
    block_size: int,
    causal: bool,
) -> jax.Array:
    """Compute which share of their attention some queries give to each key block.

    share[r, j] = sum_(s in block j) softmax_s(q_r k_s / sqrt(H))

    Args:
      q_BIRNH: float[B, I, R, N, H], queries of each query block.
      k_BSKH: float[B, S, K, H].
      positions_IR: i32[I, R], of the queries: in a causal model they see keys up to there.
      kv_mask_BS: bool[B, S], True = real token; None = all.
      block_size: int, positions of a key block.
      causal: bool, static.

    Returns:
      f32[B, N, I, R, J].

    Numerics:
      Products in the type of the queries, summed in f32; softmax in f32.
    """
    B, I, R, N, H = q_BIRNH.shape  # noqa: E741
    S, K = k_BSKH.shape[1:3]
    q = q_BIRNH.reshape(B, I, R, K, N // K, H)
    scores = jnp.einsum("birkgh,bskh->bkgirs", q, k_BSKH, preferred_element_type=jnp.float32)
    scores_BNIRS = scores.reshape(B, N, I, R, S) / math.sqrt(H)
    seen = jnp.ones((1, 1, 1, 1, S), bool)
    if causal:
        seen = (jnp.arange(S)[None, None] <= positions_IR[..., None])[None, None]
    if kv_mask_BS is not None:
        seen = seen & kv_mask_BS[:, None, None, None]
    # Where no key is seen, every score is the lowest finite one, and the shares are even.
    scores_BNIRS = jnp.where(seen, scores_BNIRS, jnp.finfo(jnp.float32).min)
    highest = scores_BNIRS.max(-1, keepdims=True)
    # Summed by block before they are normalised: one pass over the positions.
    sums = jnp.exp(scores_BNIRS - highest).reshape(B, N, I, R, -1, block_size).sum(-1)
    return sums / sums.sum(-1, keepdims=True)
