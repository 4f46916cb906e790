"""The head of a language model: tied to the embedding, or of its own.

Legend: B batch, T position, D model width, V tokens.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from sparsejax.models.config import TransformerConfig
from sparsejax.models.embedding import SparseEmbed, keep
from sparsejax.models.linear import apply_linear
from sparsejax.models.products import DENSE_LINEAR, LinearOptions, Weight, multiply_parts
from sparsejax.models.residual import make_head_init, make_kernel_inits, make_norm
from sparsejax.patterns import WeightBlocks
from sparsejax.sharding import is_mapped


class HeadTransform(nnx.Module):
    """What BERT puts around its tied head.

    y = norm(gelu(x W + b)), and a bias for each token after the head

    Attributes:
      dense: nnx.Linear f32[D, D].
      norm: nnx.LayerNorm or nnx.RMSNorm over D.
      bias: nnx.Param f32[V].
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        """Create the parameters.

        Args:
          rngs: nnx.Rngs with a `params` stream.
        """
        self.dense = nnx.Linear(
            config.model_dim,
            config.model_dim,
            kernel_init=make_kernel_inits(config, num_branches=1)[0],
            dtype=config.dtype,
            rngs=rngs,
        )
        self.norm = make_norm(config, rngs)
        self.bias = nnx.Param(jnp.zeros((config.vocab_size,), jnp.float32))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Apply what comes before the head.

        Args:
          x_BTD: float[B, T, D].

        Returns:
          float[B, T, D].
        """
        return self.norm(jax.nn.gelu(self.dense(x_BTD), approximate=False))


def make_head(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.Linear:
    """Create a head that is not tied to the embedding.

    Args:
      rngs: nnx.Rngs with a `params` stream.

    Returns:
      nnx.Linear f32[D, V], without bias.
    """
    if config.init_std is None:
        kernel_init = make_head_init(config)
    else:
        kernel_init = nnx.initializers.normal(config.init_std)
    return nnx.Linear(
        config.model_dim,
        config.vocab_size,
        use_bias=False,
        kernel_init=kernel_init,
        dtype=config.dtype,
        rngs=rngs,
    )


def compute_logits(
    head: nnx.Embed | SparseEmbed | nnx.Linear, x: jax.Array, *, options: LinearOptions
) -> jax.Array:
    """Apply the head of a language model.

    Args:
      head: the embedding that it is tied to, of either kind, or what `make_head` made.
      x: float[..., D].
      options: LinearOptions, static; of a sparse embedding.

    Returns:
      f32[..., V].
    """
    if isinstance(head, nnx.Linear):
        logits = apply_linear(
            head, x, name="head", options=DENSE_LINEAR, pruning_key=None, split="columns"
        )
    elif is_mapped() and type(head).attend in (nnx.Embed.attend, SparseEmbed.attend):
        logits = _attend_parts(head, x, options)
    elif isinstance(head, SparseEmbed):
        logits = head.attend(x, options=options)
    else:
        logits = head.attend(x)
    return logits.astype(jnp.float32)


def _attend_parts(embed, x_BTD, options):
    x_BTD, table = promote_dtype((x_BTD, embed.embedding[...]), dtype=embed.dtype)
    weight, pattern = Weight(table.T), None
    if isinstance(embed, SparseEmbed) and options.sparse:
        if isinstance(embed.pattern, WeightBlocks):
            pattern = embed.pattern
            masks = (embed.embedding_mask[...].T, embed.gradient_mask[...].T)
            weight = Weight(table.T, None, *masks)
        else:
            weight = Weight(keep(table, embed.embedding_mask[...]).T)
    options = options._replace(grad_pruning="none")
    return multiply_parts(x_BTD, weight, pattern=pattern, options=options, split="columns")
