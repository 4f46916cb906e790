"""The decoder of an encoder-decoder: it attends to its own past and to what the encoder made.

Legend: B batch, T target position, S source position, D model width, N query heads, K key/value
heads, H head dim, L decoder layers.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.models.config import TransformerConfig
from sparsejax.models.heads import attend, deal_heads, split_heads
from sparsejax.models.linear import apply_linear
from sparsejax.models.mlp import MLP
from sparsejax.models.products import DENSE_LINEAR, LinearOptions
from sparsejax.models.residual import (
    dropout,
    make_bias_init,
    make_kernel_inits,
    make_norm,
)
from sparsejax.models.rotary import Rotary, apply_rotary, get_rotary
from sparsejax.models.stack import make_stack, scan_stack
from sparsejax.sharding import cut_positions

# Folded into keys: the decoder draws other numbers than the encoder.
_DECODER = zlib.crc32(b"decoder")


class DenseAttention(nnx.Module):
    """Multi-head attention to any sequence, without a block mask.

    y = concat_n softmax(q_n k_n^T / sqrt(H)) v_n W_o,  q = x W_q,  [k, v] = memory W_kv

    Attributes:
      query: nnx.Linear f32[D, N H].
      key_value: nnx.Linear f32[D, 2 K H], keys first.
      out: nnx.Linear f32[N H, D].
    """

    def __init__(
        self, config: TransformerConfig, *, causal: bool, rotary: Rotary | None, rngs: nnx.Rngs
    ):
        """Create the projections.

        Args:
          config: TransformerConfig with decoder layers.
          causal: bool, attend to the past only.
          rotary: Rotary, how queries and keys turn with the position; None if they do not.
          rngs: nnx.Rngs with a `params` stream.
        """
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.causal, self.rotary = causal, rotary
        width, inner = config.model_dim, config.num_heads * config.head_dim
        kernel_init, out_kernel_init = _make_kernel_inits(config)
        shared: dict[str, Any] = {
            "use_bias": config.use_bias,
            "bias_init": make_bias_init(config, config.model_dim),
            "dtype": config.dtype,
            "rngs": rngs,
        }
        kv_width = 2 * config.num_kv_heads * config.head_dim
        self.query = nnx.Linear(width, inner, kernel_init=kernel_init, **shared)
        self.key_value = nnx.Linear(width, kv_width, kernel_init=kernel_init, **shared)
        self.out = nnx.Linear(inner, width, kernel_init=out_kernel_init, **shared)

    def __call__(
        self, x_BTD: jax.Array, memory_BSD: jax.Array, *, kv_mask_BS: jax.Array | None = None
    ) -> jax.Array:
        """Attend and project.

        Args:
          x_BTD: float[B, T, D], what asks.
          memory_BSD: float[B, S, D], what is attended to.
          kv_mask_BS: bool[B, S], True = visible; None = all.

        Returns:
          float[B, T, D].

        Numerics:
          Those of `block_sparse_attention`.
        """
        (B, T, _), S = x_BTD.shape, memory_BSD.shape[1]
        H = self.head_dim
        widths = [self.num_kv_heads * H] * 2
        query = self._project(self.query, x_BTD, split="columns")
        key_value = self._project(self.key_value, memory_BSD, split="columns", segments=widths)
        (q_BTNH,) = split_heads(query, [self.num_heads * H], H)
        k_BSKH, v_BSKH = split_heads(key_value, widths, H)
        if self.rotary:
            q_BTNH, k_BSKH = (apply_rotary(x, rotary=self.rotary) for x in (q_BTNH, k_BSKH))
        y_BTNH = attend(
            *deal_heads(q_BTNH, k_BSKH, v_BSKH),
            None,
            kv_mask_BS,
            block_q=T,
            block_kv=S,
            causal=self.causal,
        )
        return self._project(self.out, y_BTNH.reshape(B, T, -1), split="rows")

    def _project(self, layer, x, **options):
        return apply_linear(layer, x, name="", options=DENSE_LINEAR, pruning_key=None, **options)


class DecoderBlock(nnx.Module):
    """One pre-norm decoder block.

    Attributes:
      attention_norm, cross_attention_norm, mlp_norm: nnx.LayerNorm over D.
      attention: DenseAttention to the target's past.
      cross_attention: DenseAttention to the encoded source.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        """Create the three branches.

        Args:
          config: TransformerConfig with decoder layers.
          rngs: nnx.Rngs with a `params` stream.
        """
        self.dropout_rate = config.dropout_rate
        self.attention_norm = make_norm(config, rngs)
        self.attention = DenseAttention(config, causal=True, rotary=get_rotary(config), rngs=rngs)
        self.cross_attention_norm = make_norm(config, rngs)
        # Distances between a target's and a source's positions mean nothing.
        self.cross_attention = DenseAttention(config, causal=False, rotary=None, rngs=rngs)
        self.mlp_norm = make_norm(config, rngs)
        self.mlp = MLP(config, in_decoder=True, rngs=rngs)

    def __call__(
        self, x_BTD, encoded_BSD, *, kv_mask_BS, dropout_key, linear_options, pruning_key
    ) -> jax.Array:
        """Apply both attentions and feed-forward, each around a residual connection.

        Args:
          x_BTD: float[B, T, D].
          encoded_BSD: float[B, S, D].
          kv_mask_BS: bool[B, S], True = real token of the source, or None.
          dropout_key: typed key, or None for no dropout.
          linear_options: LinearOptions, static.
          pruning_key: typed key, or None where no gradient is pruned.

        Returns:
          float[B, T, D].
        """
        keys = (None,) * 3 if dropout_key is None else jax.random.split(dropout_key, 3)
        h_BTD = self.attention_norm(x_BTD)
        x_BTD = cut_positions(
            x_BTD + dropout(self.attention(h_BTD, h_BTD), self.dropout_rate, keys[0])
        )
        h_BTD = self.cross_attention_norm(x_BTD)
        branch = self.cross_attention(h_BTD, encoded_BSD, kv_mask_BS=kv_mask_BS)
        x_BTD = cut_positions(x_BTD + dropout(branch, self.dropout_rate, keys[1]))
        branch = self.mlp(
            self.mlp_norm(x_BTD),
            options=linear_options,
            pruning_key=pruning_key,
            dropout_key=dropout_key,
        )
        return cut_positions(x_BTD + dropout(branch, self.dropout_rate, keys[2]))


class Decoder(nnx.Module):
    """From embedded target tokens and an encoded source to what a head reads.

    Its attention is dense; the feed-forward weights may be sparse. Padding at a target's end needs
    no mask, since nothing looks ahead.

    Attributes:
      position: nnx.Param f32[max_length, D], learned positions only.
      embedding_norm: nnx.LayerNorm over D, if configured.
      blocks: DecoderBlock whose every leaf has a leading axis L.
      final_norm: nnx.LayerNorm over D.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        """Create parameters, and all-True masks of sparse weights.

        Args:
          config: TransformerConfig with decoder layers.
          rngs: nnx.Rngs with a `params` stream.
        """
        self.config = config
        if config.positions == "learned":
            shape = (config.max_length, config.model_dim)
            table_init = nnx.initializers.normal(0.02)
            self.position = nnx.Param(table_init(rngs.params(), shape, jnp.float32))
        if config.embedding_norm:
            self.embedding_norm = make_norm(config, rngs)

        self.blocks = make_stack(DecoderBlock, config, config.num_decoder_layers, rngs)
        self.final_norm = make_norm(config, rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        encoded_BSD: jax.Array,
        *,
        kv_mask_BS: jax.Array | None,
        dropout_key: jax.Array | None,
        linear_options: LinearOptions,
        pruning_key: jax.Array | None,
    ) -> jax.Array:
        """Apply all blocks.

        Args:
          x_BTD: float[B, T, D], embedded target tokens; T is at most `max_length`.
          encoded_BSD: float[B, S, D], normalized output of the encoder.
          kv_mask_BS: bool[B, S], True = real token of the source; None = all real.
          dropout_key: typed key, or None for no dropout.
          linear_options: LinearOptions of sparse weights, static.
          pruning_key: typed key, or None where no gradient is pruned.

        Returns:
          float[B, T, D].
        """
        config = self.config
        keys = [
            None if key is None else jax.random.fold_in(key, _DECODER)
            for key in (dropout_key, pruning_key)
        ]
        embedding_key = None
        if keys[0] is not None:
            embedding_key, keys[0] = jax.random.split(keys[0])
        if config.positions == "learned":
            x_BTD = x_BTD + self.position[...][None, : x_BTD.shape[1]].astype(x_BTD.dtype)
        if config.embedding_norm:
            x_BTD = self.embedding_norm(x_BTD)
        x_BTD = cut_positions(dropout(x_BTD, config.dropout_rate, embedding_key))

        def apply(block, x_BTD, keys, _):
            dropout_key, pruning_key = keys
            x_BTD = block(
                x_BTD,
                encoded_BSD,
                kv_mask_BS=kv_mask_BS,
                dropout_key=dropout_key,
                linear_options=linear_options,
                pruning_key=pruning_key,
            )
            return x_BTD, None

        x_BTD, _ = scan_stack(
            apply,
            self.blocks,
            x_BTD,
            config=config,
            num_layers=config.num_decoder_layers,
            keys=tuple(keys),
        )
        return self.final_norm(x_BTD)


def _make_kernel_inits(config: TransformerConfig):
    return make_kernel_inits(config, num_branches=3 * config.num_decoder_layers)
