"""Read prompts, then token by token: one program on the device.

Legend: B batch, T position of a prompt, V vocabulary, N new token, D model width.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax.generation.sampling import Sampling, draw_tokens
from sparsejax.models import Transformer

_SHORTEST = 16
"""Prompts and caches are not cut shorter than this many positions."""


def generate_ids(
    model: Transformer,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    stop_token: int | None,
) -> list[np.ndarray]:
    """Continue prompts, each as if it were alone but for what is drawn.

    A program is compiled for the number of prompts and the lengths of prompts and cache, which are
    rounded up to powers of two, or to `max_length`.

    Args:
      model: causal language model.
      prompts: i32[length] each, of at least one token, with room for the new ones.
      max_new_tokens: at least 1.
      sampling: how tokens are drawn.
      seed: of what is drawn.
      stop_token: the id that ends a text; None = none does.

    Returns:
      i32[at most max_new_tokens] for each prompt: what comes before the stop token.
    """
    lengths = [len(prompt) for prompt in prompts]
    limit, block = model.config.max_length, model.config.block
    length = round_length(max(lengths), limit)
    # Whole blocks: choosers of blocks read the cache.
    side = math.lcm(block.block_q, block.block_kv)
    cache_length = round_length(max(lengths) + max_new_tokens, limit)
    cache_length = max(length, cache_length) + -max(length, cache_length) % side
    tokens_BT = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    graphdef, state = nnx.split(model)
    new_BN, counts_B = jax.device_get(
        _generate(
            graphdef,
            cache_length,
            state,
            jnp.asarray(tokens_BT),
            jnp.asarray(lengths, jnp.int32),
            jnp.int32(max_new_tokens),
            sampling,
            jnp.int32(-1 if stop_token is None else stop_token),
            jax.random.key(seed),
        )
    )
    return [new_N[:count] for new_N, count in zip(new_BN, counts_B, strict=True)]


def round_length(length: int, limit: int) -> int:
    """Return the next power of two, at least 16 and at most a limit.

    Args:
      length: at most the limit.
      limit: the largest length.

    Example:
      >>> [round_length(length, 100) for length in (5, 33, 64, 65)]
      [16, 64, 64, 100]
    """
    return min(limit, max(_SHORTEST, 1 << (length - 1).bit_length()))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(
    graphdef: nnx.GraphDef,
    cache_length: int,
    state: Any,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    num_new: jax.Array,
    sampling: Sampling,
    stop_token: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return new tokens, i32[B, cache_length], and how many of them come before the stop token."""
    model = nnx.merge(graphdef, state)
    rows = jnp.arange(len(tokens_BT))
    keys_B = jax.vmap(functools.partial(jax.random.fold_in, key))(rows)

    def draw(logits_BV, step):
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
        return draw_tokens(logits_BV, keys, sampling)

    def go_on(carry):
        step, *_, goes_on_B = carry
        return (step < num_new) & goes_on_B.any()

    def add_token(carry):
        step, cache, new_BN, counts_B, goes_on_B = carry
        # What follows a stop token is of no use to anybody.
        logits_BV, cache = model.decode(new_BN[:, step - 1], cache, lengths_B + step - 1)
        token_B = draw(logits_BV, step)
        goes_on_B &= token_B != stop_token
        new_BN = new_BN.at[:, step].set(token_B)
        return step + 1, cache, new_BN, counts_B + goes_on_B, goes_on_B

    x_BTD, cache = model.prefill(tokens_BT, cache_length=cache_length)
    token_B = draw(model.compute_logits(x_BTD[rows, lengths_B - 1]), 0)
    goes_on_B = token_B != stop_token
    new_BN = jnp.zeros((len(tokens_BT), cache_length), jnp.int32).at[:, 0].set(token_B)
    first = (jnp.int32(1), cache, new_BN, goes_on_B.astype(jnp.int32), goes_on_B)
    _, _, new_BN, counts_B, _ = jax.lax.while_loop(go_on, add_token, first)
    return new_BN, counts_B
