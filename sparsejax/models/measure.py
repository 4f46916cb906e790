"""What the linear layers of a transformer's blocks read.

Legend: B batch, T position, D model width, K features of a layer's input, L layers.
"""

from collections.abc import Callable

import jax

from sparsejax.models.inputs import check_tokens
from sparsejax.models.stack import scan_stack
from sparsejax.models.transformer import Transformer
from sparsejax.types import PyTree


def measure_inputs(
    model: Transformer, tokens: jax.Array, measure: Callable[[jax.Array], PyTree]
) -> dict[str, PyTree]:
    """Apply a function to the input of every linear layer, in a call without dropout.

    Args:
      model: called as its own options say; blocks of a decoder are not measured.
      tokens: as of a call of the model; all of them real.
      measure: float[B, T, K] -> pytree of arrays.

    Returns:
      dict from layer names, such as "mlp/up", to what was measured, with a leading axis L.

    Raises:
      ValueError: if `tokens` has the wrong rank or is longer than `max_length`.
    """
    config = model.config
    attention_options, linear_options = model.attention_options, model.linear_options
    check_tokens(config, tokens.shape)
    x_BTD = model._embed(tokens, linear_options)

    def apply(block, x_BTD, _, of_layer):
        schedule, budget = of_layer
        measured = {}

        def observe(name, x_BTK):
            measured[name] = measure(x_BTK)

        x_BTD, _ = block(
            x_BTD,
            schedule=schedule,
            budget=budget,
            kv_mask_BT=None,
            dropout_key=None,
            attention_options=attention_options,
            linear_options=linear_options._replace(observe=observe),
            pruning_key=None,
            probe=False,
        )
        return x_BTD, measured

    _, measured = scan_stack(
        apply,
        model.blocks,
        x_BTD,
        config=config,
        num_layers=config.num_layers,
        keys=(),
        inputs=model._find_blocks(x_BTD.shape[1], attention_options, None),
    )
    return measured
