"""A token embedding, tied to the head of a language model, that ignores what its mask prunes.

Legend: V tokens, D model width, I x J blocks of the embedding.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax.sharding import PartitionSpec as P

from pallas_kernels import block_sparse_matmul
from sparsejax.models.products import SPARSE_LINEAR, LinearOptions
from sparsejax.models.variables import SparsityMask
from sparsejax.patterns import NMPattern, WeightBlocks, WeightPattern
from sparsejax.sharding import BATCH, fit_axis, gather_weight, is_mapped, map_parts

_EMBEDDING_INIT = nnx.initializers.normal(0.02)


class SparseEmbed(nnx.Module):
    """Embedding with a mask, in place of `nnx.Embed`: one weight and one mask at both ends.

    x = (embedding * mask)[token],  logits = x (embedding * mask)^T

    Trained straight-through, as `SparseLinear`: pruned weights get their gradient too; of blocks,
    the head computes it where `gradient_mask` says. Assign to `embedding_mask`, outside a trace, to
    prune.

    Attributes:
      embedding: nnx.Param f32[V, D], all weights, pruned ones too.
      embedding_mask: SparsityMask, True = kept: bool[V, D], or bool[I, J] of blocks.
      gradient_mask: SparsityMask bool[I, J], blocks whose gradient the head computes; blocks only.

    Example:
      >>> from sparsejax.patterns import Unstructured
      >>> embed = SparseEmbed(4, 2, pattern=Unstructured(), dtype=None, rngs=nnx.Rngs(0))
      >>> embed.embedding_mask[...] = jnp.zeros((4, 2), bool).at[1].set(True)
      >>> embed.attend(embed(jnp.array([1, 2]))) != 0
      Array([[False,  True, False, False],
             [False, False, False, False]], dtype=bool)
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        pattern: WeightPattern,
        dtype,
        embedding_init=_EMBEDDING_INIT,
        rngs: nnx.Rngs,
    ):
        """Create the parameter, that of an `nnx.Embed` with these `rngs`, and a full mask.

        Args:
          num_embeddings: int, V.
          features: int, D.
          dtype: type of activations, None for that of input and parameter together.
          embedding_init: initializer.
          rngs: nnx.Rngs with a `params` stream.

        Raises:
          ValueError: if the pattern is another, or its blocks do not divide the embedding.
        """
        shape = (num_embeddings, features)
        if isinstance(pattern, NMPattern):
            raise ValueError(
                "an embedding's pattern must be 'unstructured' or blocks such as '64x64', got "
                f"'{pattern}'"
            )
        self.pattern, self.dtype = pattern, dtype
        self.embedding = nnx.Param(embedding_init(rngs.params(), shape, jnp.float32))
        if isinstance(pattern, WeightBlocks):
            shape = pattern.grid(shape)
            self.gradient_mask = SparsityMask(jnp.ones(shape, bool))
        self.embedding_mask = SparsityMask(jnp.ones(shape, bool))

    def __call__(self, tokens: jax.Array, *, options: LinearOptions = SPARSE_LINEAR) -> jax.Array:
        """Look tokens up.

        Args:
          tokens: i32[...], below V.
          options: LinearOptions, static.

        Returns:
          float[..., D].
        """
        (embedding,) = promote_dtype((self.embedding[...],), dtype=self.dtype)
        x = jnp.take(embedding, tokens, axis=0)
        if not options.sparse:
            return x
        return self.prune(x, tokens, self.embedding_mask[...])

    def prune(self, x: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Set to 0 what a mask prunes of the vectors of tokens, but not of their gradients.

        Args:
          x: float[..., D].
          tokens: i32[...], below V.
          mask: like `embedding_mask`.

        Returns:
          float[..., D].
        """
        columns = 1
        if isinstance(self.pattern, WeightBlocks):
            tokens, columns = tokens // self.pattern.rows, self.pattern.columns
        return keep(x, jnp.take(mask, tokens, axis=0).repeat(columns, axis=-1))

    def attend(self, x: jax.Array, *, options: LinearOptions = SPARSE_LINEAR) -> jax.Array:
        """Compute logits: the product of the head that is tied to this embedding.

        Args:
          x: float[..., D].
          options: LinearOptions, static; `grad_pruning` has no effect here.

        Returns:
          float[..., V].

        Numerics:
          As `nnx.Embed.attend`; of blocks, those of `pallas_kernels.block_sparse_matmul`.
        """
        x, embedding = promote_dtype((x, self.embedding[...]), dtype=self.dtype)
        if options.sparse and isinstance(self.pattern, WeightBlocks):
            return block_sparse_matmul(
                x,
                embedding.T,
                self.embedding_mask[...].T,
                grad_mask=self.gradient_mask[...].T,
                implementation=options.implementation,
            )
        if options.sparse:
            embedding = keep(embedding, self.embedding_mask[...])
        return jnp.dot(x, embedding.T)


@jax.custom_jvp
def keep(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Set to 0 what a mask prunes, but not its gradient.

    Args:
      x: array.
      mask: bool, of its shape; True = kept.

    Returns:
      Array like `x`.
    """
    return jnp.where(mask, x, 0)


@keep.defjvp
def _pass_all_gradients(primals, tangents):
    return keep(*primals), tangents[0]


def make_embed(
    num_embeddings: int, features: int, *, pattern: WeightPattern | None, **options
) -> nnx.Embed | SparseEmbed:
    """Create the embedding of tokens, whose weight may be sparse.

    Args:
      num_embeddings: int, V.
      features: int, D.
      pattern: of `SparseEmbed`, None for `nnx.Embed`.
      **options: what both take.

    Returns:
      SparseEmbed or nnx.Embed, with equal parameters.
    """
    if pattern is None:
        return nnx.Embed(num_embeddings, features, **options)
    return SparseEmbed(num_embeddings, features, pattern=pattern, **options)


def look_up(
    embed: nnx.Embed | SparseEmbed, tokens: jax.Array, *, options: LinearOptions
) -> jax.Array:
    """Look tokens up in an embedding of either kind.

    Args:
      tokens: i32[...], below V.
      options: LinearOptions, static.

    Returns:
      float[..., D].
    """
    if is_mapped() and type(embed).__call__ in (nnx.Embed.__call__, SparseEmbed.__call__):
        return _look_up_parts(embed, tokens, options)
    return embed(tokens, options=options) if isinstance(embed, SparseEmbed) else embed(tokens)


def _look_up_parts(embed, tokens_BT, options):
    """Look up on each device its tokens, in its rows of a table that is gathered over "fsdp"."""
    (table,) = promote_dtype((embed.embedding[...],), dtype=embed.dtype)
    mask = embed.embedding_mask[...] if isinstance(embed, SparseEmbed) and options.sparse else None
    rows, columns = (
        fit_axis(name, size) for name, size in zip(("tensor", "fsdp"), table.shape, strict=True)
    )

    num_rows = table.shape[0]

    def run(tokens, table, mask):
        if columns is not None:
            table = gather_weight(table, 1)
        if rows is None:
            x = jnp.take(table, tokens, axis=0)
        else:
            first = jax.lax.axis_index(rows) * table.shape[0]
            here = (tokens >= first) & (tokens < first + table.shape[0])
            x = jnp.take(table, jnp.where(here, tokens - first, 0), axis=0)
            x = jax.lax.psum(jnp.where(here[..., None], x, jnp.zeros((), x.dtype)), rows)
            # As `jnp.take` has it of ids that there are not.
            known = (tokens >= 0) & (tokens < num_rows)
            x = jnp.where(known[..., None], x, jnp.full((), jnp.nan, x.dtype))
        return x if mask is None else embed.prune(x, tokens, mask)

    positions = P(BATCH, "context")
    return map_parts(run, (positions, P(rows, columns), P()), positions)(tokens_BT, table, mask)
