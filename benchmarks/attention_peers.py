"""Dense attention of JAX, which block-sparse attention is compared with.

Every function has the arguments (q, k, v, mask, problem); the mask is one of blocks, or None.
"""

import math

import jax
import jax.numpy as jnp

from benchmarks.attention_problems import Problem


def attention_by_hand(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, problem: Problem
) -> jax.Array:
    """Compute softmax(Q K^T) V as one writes it down, masked where there is a mask.

    Args:
      q: float[B, T, N, H], queries.
      k: float[B, T, N, H], keys.
      v: float[B, T, N, H], values.
      mask: bool[1, 1, I, I] or None.
      problem: the setting.

    Returns:
      float[B, T, N, H].
    """
    s = jnp.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(problem.head_dim)
    attended = _attended(mask, problem)
    if attended is not None:
        s = jnp.where(attended, s, -jnp.inf)
    some = True if attended is None else attended.any(axis=-1, keepdims=True)
    p = jax.nn.softmax(jnp.where(some, s, 0.0), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", jnp.where(some, p, 0.0), v)


def jax_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, problem: Problem
) -> jax.Array:
    """Call `jax.nn.dot_product_attention` with the mask spread over all logits.

    Args:
      q: float[B, T, N, H], queries.
      k: float[B, T, N, H], keys.
      v: float[B, T, N, H], values.
      mask: bool[1, 1, I, I] or None.
      problem: the setting.

    Returns:
      float[B, T, N, H].
    """
    attended = None if mask is None else _attended(mask, problem)
    causal = problem.causal and mask is None
    out = jax.nn.dot_product_attention(
        q, k, v, mask=attended, is_causal=causal, implementation="xla"
    )
    if attended is None:
        return out
    return jnp.where(attended.any(axis=-1).swapaxes(1, 2)[..., None], out, 0)


def cudnn_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, problem: Problem
) -> jax.Array:
    """Call cuDNN's attention over every visible logit, whatever the block mask is.

    cuDNN has no use for a block mask. This is the dense number to hold the others against, and
    its reference is dense attention without the mask.

    Args:
      q: float[B, T, N, H], queries, 16 bits.
      k: float[B, T, N, H], keys.
      v: float[B, T, N, H], values.
      mask: ignored.
      problem: the setting.

    Returns:
      float[B, T, N, H].
    """
    return jax.nn.dot_product_attention(q, k, v, is_causal=problem.causal, implementation="cudnn")


def _attended(mask, problem):
    attended = None
    if mask is not None:
        attended = jnp.repeat(jnp.repeat(mask, problem.block, axis=2), problem.block, axis=3)
    if problem.causal:
        triangle = jnp.tri(problem.length, dtype=bool)[None, None]
        attended = triangle if attended is None else attended & triangle
    return attended
