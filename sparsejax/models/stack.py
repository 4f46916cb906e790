"""Blocks of one kind, stacked on a leading layer axis and applied one after the other.

Legend: B batch, T position, D model width, L layers.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from sparsejax.models.config import TransformerConfig
from sparsejax.models.products import REMADE
from sparsejax.sharding import is_mapped


def make_stack[Block: nnx.Module](
    block_class: Callable[..., Block], config: TransformerConfig, num_layers: int, rngs: nnx.Rngs
) -> Block:
    """Create blocks whose every leaf has a leading axis L.

    Args:
      block_class: class of the blocks, called with `config` and `rngs`.
      num_layers: int, L.
      rngs: nnx.Rngs with a `params` stream.

    Returns:
      A module of the class.
    """

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap
    def create(rngs):
        return block_class(config, rngs=rngs)

    return create(rngs)


def scan_stack(
    apply: Callable[..., tuple[jax.Array, Any]],
    blocks: nnx.Module,
    x_BTD: jax.Array,
    *,
    config: TransformerConfig,
    num_layers: int,
    keys: tuple[jax.Array | None, ...],
    inputs: Any = None,
) -> tuple[jax.Array, Any]:
    """Apply the blocks of a stack, recomputed in the backward pass or unrolled as configured.

    Args:
      apply: (block, x_BTD, keys of the layer, inputs of the layer) -> (x_BTD, output of the layer).
      blocks: what `make_stack` created.
      x_BTD: float[B, T, D].
      num_layers: int, L.
      keys: typed keys, each split into one per layer, or None.
      inputs: pytree of arrays with a leading axis L, or None.

    Returns:
      float[B, T, D], and the outputs with a leading axis L.
    """
    graphdef, state = nnx.split(blocks)
    layer_keys = tuple(None if key is None else jax.random.split(key, num_layers) for key in keys)

    def apply_layer(x_BTD, layer):
        state, keys, inputs = layer
        return apply(nnx.merge(graphdef, state), x_BTD, keys, inputs)

    if config.remat or is_mapped():
        # On a mesh at least weights are gathered again, rather than kept whole.
        keep = None if config.remat else jax.checkpoint_policies.save_anything_except_these_names
        apply_layer = jax.checkpoint(
            apply_layer,
            prevent_cse=not config.scan_layers,
            policy=keep and keep(*REMADE),
        )
    unroll = 1 if config.scan_layers else num_layers
    return jax.lax.scan(apply_layer, x_BTD, (state, layer_keys, inputs), unroll=unroll)
