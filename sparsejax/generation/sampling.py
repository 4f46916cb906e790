"""From logits to the next token of each example.

Legend: B batch, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """How tokens are drawn; each number may change without compiling anew.

    Attributes:
      temperature: f32[], above 0: logits are divided by it; None takes the likeliest token.
      top_k: i32[], so many of the likeliest tokens may be drawn; None = all.
      top_p: f32[], in (0, 1]: the nucleus that may be drawn (`keep_nucleus`); None = all.
    """

    temperature: jax.Array | None
    top_k: jax.Array | None = None
    top_p: jax.Array | None = None


def draw_tokens(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Draw a token of each example from softmax(logits / temperature), or take the likeliest.

    Only those that `top_k` keeps may be drawn, and of these only the nucleus of `top_p`.

    Args:
      logits_BV: f32[B, V].
      keys_B: typed keys, one of each example.

    Returns:
      i32[B].
    """
    if sampling.temperature is None:
        return logits_BV.argmax(-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k is not None:
        logits_BV = _keep(logits_BV, _rank(logits_BV) < sampling.top_k)
    if sampling.top_p is not None:
        logits_BV = _keep(logits_BV, keep_nucleus(logits_BV, sampling.top_p))
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def keep_nucleus(logits_BV: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """Return the fewest tokens, the likeliest first, whose probabilities sum to `top_p` or more.

    Args:
      logits_BV: f32[B, V].
      top_p: f32[], in (0, 1].

    Returns:
      bool[B, V], True = kept: one token at least. Of equally likely ones the first come first.

    References:
      Holtzman et al., arXiv:1904.09751, section 3.1.

    Example:
      >>> logits = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25]]))
      >>> keep_nucleus(logits, 0.7).tolist()
      [[False, True, False, True]]
    """
    ranks_BV = _rank(logits_BV)
    sorted_BV = jnp.sort(jax.nn.softmax(logits_BV), descending=True)
    before_BV = jnp.cumsum(sorted_BV, -1) - sorted_BV
    return jnp.take_along_axis(before_BV, ranks_BV, -1) < top_p


def _rank(logits_BV: jax.Array) -> jax.Array:
    """Return how many tokens are likelier, i32[B, V]."""
    return jnp.argsort(jnp.argsort(logits_BV, descending=True, stable=True))


def _keep(logits_BV: jax.Array, kept_BV: jax.Array) -> jax.Array:
    return jnp.where(kept_BV, logits_BV, -jnp.inf)
