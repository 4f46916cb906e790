"""How likely a causal language model finds continuations of texts.

Legend: B batch, T position, V vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax.generation.loop import round_length
from sparsejax.models import Transformer

_MOST_EXAMPLES = 64
_MOST_LOGITS = 1 << 26
"""Of a batch; as float32 they take 256 MiB."""


def score_continuations(
    model: Transformer, contexts: Sequence[np.ndarray], continuations: Sequence[np.ndarray]
) -> np.ndarray:
    """Sum the log-likelihoods of the tokens of continuations, each given all tokens before it.

    Examples of about the same length are computed together.

    Args:
      model: causal language model.
      contexts: i32[length] each, of at least one token.
      continuations: as many, likewise; what is read before the last token fits `max_length`.

    Returns:
      f64[number], in nats.

    Numerics:
      log-softmax and sums of an example in f32.
    """
    limit, vocab_size = model.config.max_length, model.config.vocab_size
    texts = [np.concatenate(pair) for pair in zip(contexts, continuations, strict=True)]
    buckets: dict[int, list[int]] = {}
    for number, text in enumerate(texts):
        buckets.setdefault(round_length(len(text) - 1, limit), []).append(number)
    graphdef, state = nnx.split(model)
    scores = np.zeros(len(texts))
    for length, numbers in sorted(buckets.items()):
        size = min(_MOST_EXAMPLES, max(1, _MOST_LOGITS // (length * vocab_size)))
        size = min(size, 1 << (len(numbers) - 1).bit_length())
        for start in range(0, len(numbers), size):
            members = numbers[start : start + size]
            tokens_BT = np.zeros((size, length + 1), np.int32)
            asked_BT = np.zeros((size, length), bool)
            for row, number in enumerate(members):
                tokens_BT[row, : len(texts[number])] = texts[number]
                asked_BT[row, len(contexts[number]) - 1 : len(texts[number]) - 1] = True
            found_B = _score(graphdef, state, jnp.asarray(tokens_BT), jnp.asarray(asked_BT))
            scores[members] = jax.device_get(found_B)[: len(members)]
    return scores


@functools.partial(jax.jit, static_argnums=0)
def _score(
    graphdef: nnx.GraphDef, state: Any, tokens_BT: jax.Array, asked_BT: jax.Array
) -> jax.Array:
    """Return f32[B], summed over the predictions of `tokens_BT[:, 1:]` that are asked for."""
    logits_BTV = nnx.merge(graphdef, state)(tokens_BT[:, :-1]).logits
    targets_BT1 = tokens_BT[:, 1:, None]
    found_BT = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), targets_BT1, -1)[..., 0]
    return jnp.where(asked_BT, found_BT, 0.0).sum(-1)
