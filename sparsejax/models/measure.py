"""What linear layers and heads of a transformer's blocks read, and what a loss asks of heads.

Legend: B batch, T position, N query heads, K key/value heads, H head dim, D model width,
F features of a layer's input, L layers.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.models.attention import AttentionOptions
from sparsejax.models.inputs import check_tokens
from sparsejax.models.stack import scan_stack
from sparsejax.models.transformer import Transformer
from sparsejax.types import PyTree


class HeadStates(NamedTuple):
    """What the heads of all layers attend with, and what comes of it.

    Attributes:
      q_LBTNH: float[L, B, T, N, H].
      k_LBTKH: float[L, B, T, K, H].
      v_LBTKH: float[L, B, T, K, H].
      y_LBTNH: float[L, B, T, N, H], outputs before their projection.
      gradient_LBTNH: float[L, B, T, N, H], of the summed loss of all tokens, in nats, with respect
        to y; None if it was not asked for.
    """

    q_LBTNH: jax.Array
    k_LBTKH: jax.Array
    v_LBTKH: jax.Array
    y_LBTNH: jax.Array
    gradient_LBTNH: jax.Array | None


@dataclasses.dataclass(frozen=True)
class _KeepAll:
    """A chooser that keeps every block, so that the cache of a prompt holds its queries."""

    grid: tuple[int, int]
    lookahead = False

    def budget(self, num_blocks, num_heads):
        return np.full((1, num_blocks), num_heads, np.int32)

    def measure_density(self, num_blocks, num_heads):
        return np.ones(1)

    def __call__(self, q_BTNH, k_BSKH, kv_mask_BS, budget):
        return jnp.ones((q_BTNH.shape[0], q_BTNH.shape[2], *self.grid), bool)


def measure_inputs(
    model: Transformer, tokens: jax.Array, measure: Callable[[jax.Array], PyTree]
) -> dict[str, PyTree]:
    """Apply a function to the input of every linear layer, in a call without dropout.

    Args:
      model: called as its own options say; blocks of a decoder are not measured.
      tokens: as of a call of the model; all of them real.
      measure: float[B, T, F] -> pytree of arrays.

    Returns:
      dict from layer names, such as "mlp/up", to what was measured, with a leading axis L.

    Raises:
      ValueError: if `tokens` has the wrong rank or is longer than `max_length`.
    """

    def tap(name, x_BTF, _, measured):
        measured[name] = measure(x_BTF)
        return x_BTF

    _, (measured, _) = _read_blocks(model, tokens, model.attention_options, tap)
    return measured


def measure_heads(
    model: Transformer, tokens_BT: jax.Array, *, gradients: bool = True
) -> HeadStates:
    """Read what the heads of a causal language model attend with, where they attend everywhere.

    Args:
      tokens_BT: i32[B, T], T = `max_length`.
      gradients: bool, static; also differentiate the loss of predicting every token but the first.

    Returns:
      HeadStates of all layers, with a gradient where it was asked for.

    Raises:
      ValueError: if the model is no causal language model, or the tokens do not fill it.
    """
    config = model.config
    if not config.causal:
        raise ValueError("the model must be a causal language model, got causal=False")
    if tokens_BT.shape[1:] != (config.max_length,):
        expected = f"tokens_BT must be [B, max_length={config.max_length}]"
        raise ValueError(f"{expected}, got {tokens_BT.shape}")

    def tap(name, x_BTF, offset, seen):
        if name == "attention/out":
            seen["y"] = x_BTF
            return x_BTF if offset is None else x_BTF + offset.astype(x_BTF.dtype)
        return x_BTF

    def read(offsets_LBTF):
        options = AttentionOptions(choose_blocks=_KeepAll(config.block.grid(config.max_length)))
        x_BTD, (seen, cache) = _read_blocks(model, tokens_BT, options, tap, offsets_LBTF)
        states = HeadStates(
            cache.chosen.q_BSNH,
            cache.k_BSKH,
            cache.v_BSKH,
            seen["y"].reshape(cache.chosen.q_BSNH.shape),
            None,
        )
        if offsets_LBTF is None:
            return jnp.zeros(()), states
        logits_BTV = model.compute_logits(model._normalise(x_BTD))[:, :-1]
        scores = jnp.take_along_axis(logits_BTV, tokens_BT[:, 1:, None], axis=-1)[..., 0]
        return (jax.nn.logsumexp(logits_BTV, axis=-1) - scores).sum(), states

    if not gradients:
        return read(None)[1]
    width = config.num_heads * config.head_dim
    zeros_LBTF = jnp.zeros((config.num_layers, *tokens_BT.shape, width), jnp.float32)
    gradient, states = jax.grad(read, has_aux=True)(zeros_LBTF)
    return states._replace(gradient_LBTNH=gradient.reshape(states.y_LBTNH.shape))


def _read_blocks(model, tokens, attention_options, tap, of_layers=None):
    """Return what the last block makes of tokens, and by layer what `tap` put down and the cache.

    `tap` takes a layer's name and input, what `of_layers` has for the block, and a dict to put
    things down in; it returns what the layer is to read.
    """
    config, linear_options = model.config, model.linear_options
    check_tokens(config, tokens.shape)
    x_BTD = model._embed(tokens, linear_options)

    def apply(block, x_BTD, _, of_layer):
        (schedule, budget), mine = of_layer
        seen = {}
        x_BTD, cache = block.prefill(
            x_BTD,
            schedule=schedule,
            budget=budget,
            cache_length=config.max_length,
            attention_options=attention_options,
            linear_options=linear_options._replace(
                tap=lambda name, x_BTF: tap(name, x_BTF, mine, seen)
            ),
        )
        return x_BTD, (seen, cache)

    return scan_stack(
        apply,
        model.blocks,
        x_BTD,
        config=config,
        num_layers=config.num_layers,
        keys=(),
        inputs=(model._find_blocks(x_BTD.shape[1], attention_options, None), of_layers),
    )
