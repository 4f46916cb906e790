"""The feed-forward layer of a transformer, plain or gated, dense or sparse.

Legend: B batch, T position, D model width, F feed-forward width.
"""

import zlib
from typing import Any

import jax
from flax import nnx

from sparsejax.models.config import (
    GATED_ACTIVATIONS,
    MLPActivation,
    TransformerConfig,
    sparse_weight_patterns,
)
from sparsejax.models.linear import apply_linear, make_linear
from sparsejax.models.products import SPARSE_LINEAR, LinearOptions
from sparsejax.models.residual import dropout, make_bias_init, make_kernel_inits

# Folded into a block's key, which is split for its branches: neither changes the other's numbers.
_HIDDEN = zlib.crc32(b"hidden")


class MLP(nnx.Module):
    """Feed-forward layer.

    y = dropout(act(x W_in)) W_out
    gelu, gelu_exact: act(z) = gelu(z),  relu: act(z) = max(z, 0),
    geglu: act([v, g]) = v gelu(g),  swiglu: act([v, g]) = v silu(g)

    Attributes:
      up: nnx.Linear or SparseLinear, f32[D, F]; f32[D, 2 F] if gated, values first.
      down: nnx.Linear or SparseLinear, f32[F, D].
    """

    def __init__(self, config: TransformerConfig, *, in_decoder: bool = False, rngs: nnx.Rngs):
        """Create both projections.

        Args:
          config: read are its sizes, activation, dropout, weight patterns, initial values, biases
            and type.
          in_decoder: the layer belongs to the decoder of an encoder-decoder.
          rngs: nnx.Rngs with a `params` stream.
        """
        self.activation: MLPActivation = config.mlp_activation
        self.dropout_rate = config.mlp_dropout_rate
        num_branches = 3 * config.num_decoder_layers if in_decoder else 2 * config.num_layers
        kernel_init, out_kernel_init = make_kernel_inits(config, num_branches=num_branches)
        patterns, prefix = sparse_weight_patterns(config), "decoder/" if in_decoder else ""
        shared: dict[str, Any] = {
            "use_bias": config.use_bias,
            "dtype": config.dtype,
            "rngs": rngs,
        }
        gated = config.mlp_activation in GATED_ACTIVATIONS
        self.up = make_linear(
            config.model_dim,
            (2 if gated else 1) * config.mlp_dim,
            pattern=patterns.get(f"{prefix}mlp/up"),
            kernel_init=kernel_init,
            bias_init=make_bias_init(config, config.model_dim),
            **shared,
        )
        self.down = make_linear(
            config.mlp_dim,
            config.model_dim,
            pattern=patterns.get(f"{prefix}mlp/down"),
            kernel_init=out_kernel_init,
            bias_init=make_bias_init(config, config.mlp_dim),
            **shared,
        )

    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        options: LinearOptions = SPARSE_LINEAR,
        pruning_key: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Apply the layer.

        Args:
          x_BTD: float[B, T, D].
          options: LinearOptions of sparse weights, static.
          pruning_key: typed key; needed where the options prunes gradients of sparse weights.
          dropout_key: typed key of the block, or None for no dropout; other dropout of the block
            draws other numbers.

        Returns:
          float[B, T, D].
        """
        gated = self.activation in GATED_ACTIVATIONS
        hidden_BTF = apply_linear(
            self.up,
            x_BTD,
            name="mlp/up",
            options=options,
            pruning_key=pruning_key,
            activation=self.activation,
            split="columns",
            segments=[self.up.out_features // 2] * 2 if gated else (),
        )
        if dropout_key is not None:
            dropout_key = jax.random.fold_in(dropout_key, _HIDDEN)
        hidden_BTF = dropout(hidden_BTF, self.dropout_rate, dropout_key)
        return apply_linear(
            self.down,
            hidden_BTF,
            name="mlp/down",
            options=options,
            pruning_key=pruning_key,
            split="rows",
        )
