"""What surrounds every branch of a residual stream: normalization, initial values, dropout."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.models.config import TransformerConfig


def make_norm(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.LayerNorm | nnx.RMSNorm:
    """Create a normalization over the width of the model.

    Args:
      rngs: nnx.Rngs with a `params` stream.

    Returns:
      nnx.LayerNorm or nnx.RMSNorm, as `config.norm` says.
    """
    shared: dict[str, Any] = {"epsilon": config.norm_epsilon, "dtype": config.dtype, "rngs": rngs}
    if config.norm == "rms":
        return nnx.RMSNorm(config.model_dim, **shared)
    return nnx.LayerNorm(config.model_dim, use_bias=config.use_norm_bias, **shared)


def make_kernel_inits(
    config: TransformerConfig, *, num_branches: int
) -> tuple[nnx.Initializer, nnx.Initializer]:
    """Return the initializers of weights in a stack of blocks.

    Args:
      num_branches: int, branches that add to the stack's residual stream, of all layers.

    Returns:
      Initializer of weights inside a branch, and of those that a branch ends with.
    """
    if config.init_std is None:
        kernel_init = make_head_init(config)
        return kernel_init, kernel_init
    return (
        nnx.initializers.normal(config.init_std),
        nnx.initializers.normal(config.init_std / num_branches**0.5),
    )


def make_head_init(config: TransformerConfig) -> nnx.Initializer:
    """Return the initializer of weights that follow `linear_init` alone, such as a classifier's."""
    if config.linear_init == "torch":
        # Of this variance within 1 / sqrt(inputs).
        return nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    return nnx.initializers.lecun_normal()


def make_bias_init(config: TransformerConfig, in_features: int) -> nnx.Initializer:
    """Return the initializer of a linear layer's bias.

    Args:
      in_features: int, inputs of the layer.
    """
    if config.linear_init == "torch":
        bound = in_features**-0.5
        return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
            key, shape, dtype, -bound, bound
        )
    return nnx.initializers.zeros_init()


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero entries at random and scale the rest so that the mean is kept.

    Args:
      x: float array.
      rate: float in [0, 1), static; the fraction zeroed.
      key: typed key; None returns `x` unchanged.

    Returns:
      Array like `x`.
    """
    if key is None or rate == 0.0:
        return x
    # Of 32 bits also where `jax_enable_x64` is set: the draws are the same.
    kept = jax.random.bernoulli(key, jnp.float32(1.0 - rate), x.shape)
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros_like(x))
