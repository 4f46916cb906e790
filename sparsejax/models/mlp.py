"""The feed-forward layer of a transformer, plain or gated, dense or sparse.

Legend: B batch, T position, D model width, F feed-forward width.
"""

from typing import Literal

import jax
from flax import nnx

from sparsejax.models.linear import SPARSE_LINEAR, LinearMode, apply_linear, make_linear
from sparsejax.patterns import WeightPattern

type MLPActivation = Literal["gelu", "relu", "geglu", "swiglu"]

GATED_ACTIVATIONS = ("geglu", "swiglu")
"""Activations that compute twice as many values, half of them gates."""

_KERNEL_INIT = nnx.initializers.lecun_normal()


class MLP(nnx.Module):
    """Feed-forward layer.

    y = act(x W_in) W_out;  gelu: act(z) = gelu(z),  relu: act(z) = max(z, 0),
    geglu: act([v, g]) = v gelu(g),  swiglu: act([v, g]) = v silu(g)

    Attributes:
      up: nnx.Linear or SparseLinear, f32[D, F]; f32[D, 2 F] if gated, values first.
      down: nnx.Linear or SparseLinear, f32[F, D].
    """

    def __init__(
        self,
        model_dim: int,
        mlp_dim: int,
        *,
        activation: MLPActivation = "gelu",
        use_bias: bool = True,
        up_pattern: WeightPattern | None = None,
        down_pattern: WeightPattern | None = None,
        dtype=None,
        kernel_init=_KERNEL_INIT,
        out_kernel_init=_KERNEL_INIT,
        rngs: nnx.Rngs,
    ):
        """Create both projections.

        Args:
          model_dim: int, D.
          mlp_dim: int, F.
          activation: "gelu" or "relu", or the gated "geglu" or "swiglu".
          use_bias: bool, add biases.
          up_pattern: pattern of the first weight, None if it is dense.
          down_pattern: pattern of the second weight, None if it is dense.
          dtype: type of activations, None for that of input and parameters together.
          kernel_init: initializer of `up`.
          out_kernel_init: initializer of `down`.
          rngs: nnx.Rngs with a `params` stream.
        """
        self.activation: MLPActivation = activation
        self.up = make_linear(
            model_dim,
            2 * mlp_dim if activation in GATED_ACTIVATIONS else mlp_dim,
            use_bias=use_bias,
            pattern=up_pattern,
            dtype=dtype,
            kernel_init=kernel_init,
            rngs=rngs,
        )
        self.down = make_linear(
            mlp_dim,
            model_dim,
            use_bias=use_bias,
            pattern=down_pattern,
            dtype=dtype,
            kernel_init=out_kernel_init,
            rngs=rngs,
        )

    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        mode: LinearMode = SPARSE_LINEAR,
        pruning_key: jax.Array | None = None,
    ) -> jax.Array:
        """Apply the layer.

        Args:
          x_BTD: float[B, T, D].
          mode: LinearMode of sparse weights, static.
          pruning_key: typed key; needed where the mode prunes gradients of sparse weights.

        Returns:
          float[B, T, D].
        """
        hidden_BTF = apply_linear(
            self.up,
            x_BTD,
            name="mlp/up",
            mode=mode,
            pruning_key=pruning_key,
            activation=self.activation,
        )
        return apply_linear(
            self.down, hidden_BTF, name="mlp/down", mode=mode, pruning_key=pruning_key
        )
