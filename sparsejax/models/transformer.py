"""The transformer: a language model, an encoder that classifies, or an encoder-decoder.

Legend: B batch, T position, U target position, P value of a patch, D model width, V vocabulary,
C classes, L layers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import make_block_schedule
from sparsejax.models.attention import SPARSE, AttentionOptions, make_budgets
from sparsejax.models.block import Block
from sparsejax.models.block_lists import BlockLists
from sparsejax.models.cache import LayerCache
from sparsejax.models.config import EMBEDDING, TransformerConfig, sparse_weight_patterns
from sparsejax.models.decoder import Decoder
from sparsejax.models.embedding import look_up, make_embed
from sparsejax.models.head import HeadTransform, compute_logits, make_head
from sparsejax.models.inputs import check_cache_length, check_decoder_tokens, check_tokens
from sparsejax.models.products import SPARSE_LINEAR, LinearOptions
from sparsejax.models.residual import (
    dropout,
    make_bias_init,
    make_head_init,
    make_kernel_inits,
    make_norm,
)
from sparsejax.models.stack import make_stack, scan_stack
from sparsejax.patterns import HeadMaps
from sparsejax.sharding import cut_positions


class ModelOutput(NamedTuple):
    """What the forward pass returns.

    Attributes:
      logits: f32[B, T, V] of a language model, f32[B, C] of a classifier, f32[B, U, V] of an
        encoder-decoder.
      attention_maps: f32[L, T, T] averaged over batch and heads if probed, else None; those of an
        encoder if there is a decoder. HeadMaps with an axis L where options pool each head's map.
    """

    logits: jax.Array
    attention_maps: jax.Array | HeadMaps | None


class Transformer(nnx.Module):
    """Language model shaped as GPT-2 or Llama, or encoder as in Long Range Arena (mean pooling).

    Or an encoder whose output a decoder attends to, for translation; source, target and head then
    share one embedding.

    Patches are images' bytes b: x = (b / 127.5 - 1) W + bias takes the place of the embedding.

    Parameters and masks of the blocks are stacked on a leading layer axis.

    Attributes:
      embedding: nnx.Embed or SparseEmbed, f32[V, D]; of token ids only.
      patches: nnx.Linear, f32[P, D]; of patches only.
      position: nnx.Param f32[max_length, D], learned positions only.
      embedding_norm: nnx.LayerNorm or nnx.RMSNorm over D, if configured.
      blocks: Block whose every leaf has a leading axis L.
      final_norm: nnx.LayerNorm or nnx.RMSNorm over D, after pre-norm blocks.
      decoder: Decoder of an encoder-decoder.
      head: nnx.Linear f32[D, V] of a language model whose head is not tied.
      head_transform: HeadTransform, if configured.
      hidden: nnx.Linear of a classifier's head, the first of two.
      classifier: nnx.Linear of a classifier's head, the second.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        """Create parameters and all-True masks.

        Args:
          rngs: nnx.Rngs with a `params` stream.
        """
        self.config = config
        # What calls do that name no options; a loaded model has those of its phase.
        self.attention_options, self.linear_options = SPARSE, SPARSE_LINEAR
        dtype = config.dtype
        table_init = nnx.initializers.normal(0.02)
        if config.patch_values:
            self.patches = nnx.Linear(
                config.patch_values,
                config.model_dim,
                use_bias=config.use_bias,
                dtype=dtype,
                kernel_init=make_kernel_inits(config, num_branches=1)[0],
                bias_init=make_bias_init(config, config.patch_values),
                rngs=rngs,
            )
        else:
            self.embedding = make_embed(
                config.vocab_size,
                config.model_dim,
                pattern=sparse_weight_patterns(config).get(EMBEDDING),
                dtype=dtype,
                embedding_init=table_init,
                rngs=rngs,
            )
        if config.positions == "learned":
            shape = (config.max_length, config.model_dim)
            self.position = nnx.Param(table_init(rngs.params(), shape, jnp.float32))
        if config.embedding_norm:
            self.embedding_norm = make_norm(config, rngs)

        self.blocks = make_stack(Block, config, config.num_layers, rngs)
        if config.norm_position == "pre":
            self.final_norm = make_norm(config, rngs)
        if config.num_decoder_layers:
            self.decoder = Decoder(config, rngs=rngs)
        if config.head_transform:
            self.head_transform = HeadTransform(config, rngs=rngs)
        if not config.tied_head:
            self.head = make_head(config, rngs)
        if config.num_classes:
            # Two documents are compared through x, y, x*y and x-y.
            features = config.model_dim * (4 if config.num_towers == 2 else 1)
            shared: dict[str, Any] = {
                "use_bias": config.use_bias,
                "kernel_init": make_head_init(config),
                "dtype": dtype,
                "rngs": rngs,
            }
            self.hidden = nnx.Linear(
                features, config.mlp_dim, bias_init=make_bias_init(config, features), **shared
            )
            self.classifier = nnx.Linear(
                config.mlp_dim,
                config.num_classes,
                bias_init=make_bias_init(config, config.mlp_dim),
                **shared,
            )

    def __call__(
        self,
        tokens: jax.Array,
        *,
        decoder_tokens: jax.Array | None = None,
        mask: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        attention_options: AttentionOptions | None = None,
        linear_options: LinearOptions | None = None,
        pruning_key: jax.Array | None = None,
        block_lists: BlockLists = None,
        probe: bool = False,
    ) -> ModelOutput:
        """Compute logits.

        Args:
          tokens: i32[B, T]; i32[B, 2, T] with two towers; u8[B, T, P], patches.
          decoder_tokens: i32[B, U] of an encoder-decoder: what comes before each target token; None
            for any other model.
          mask: bool, shape of `tokens` without P, True = real token; None = all real.
          dropout_key: typed key; None switches dropout off.
          attention_options: AttentionOptions, static; None = the model's own attribute, sparse
            unless it was loaded from a phase that was not.
          linear_options: LinearOptions of sparse weights, static; None likewise.
          pruning_key: typed key; needed where `linear_options` prune gradients of sparse weights,
            without effect elsewhere.
          block_lists: what `make_block_lists` returns for the model's masks, to build it once and
            not in every call; None builds it here. Not used for T below `max_length`.
          probe: bool, static; also return each layer's mean attention map.

        Raises:
          ValueError: if `tokens` or `decoder_tokens` has the wrong rank or is longer than
            `max_length`, `decoder_tokens` is missing or has no use, or `pruning_key` is missing.
        """
        config = self.config
        attention_options = attention_options or self.attention_options
        linear_options = linear_options or self.linear_options
        check_tokens(config, tokens.shape)
        check_decoder_tokens(config, tokens, decoder_tokens)
        draws = linear_options.sparse and linear_options.grad_pruning != "none"
        if not (draws and config.sparse_weights):
            pruning_key = None
        elif pruning_key is None:
            raise ValueError(
                f"pruning_key must be given where grad_pruning={linear_options.grad_pruning!r}"
            )
        x_BTD = self._embed(tokens, linear_options)
        mask_BT = None if mask is None else mask.reshape(x_BTD.shape[:2])
        embedding_key = block_key = dropout_key
        if dropout_key is not None:
            embedding_key, block_key = jax.random.split(dropout_key)
        x_BTD = cut_positions(dropout(x_BTD, config.dropout_rate, embedding_key))
        x_BTD, attention_maps = self._apply_blocks(
            x_BTD,
            mask_BT,
            (block_key, pruning_key),
            attention_options=attention_options,
            linear_options=linear_options,
            block_lists=block_lists,
            probe=probe,
        )
        x_BTD = self._normalise(x_BTD)
        if decoder_tokens is not None:
            x_BTD = self.decoder(
                look_up(self.embedding, decoder_tokens, options=linear_options),
                x_BTD,
                kv_mask_BS=mask_BT,
                dropout_key=dropout_key,
                linear_options=linear_options,
                pruning_key=pruning_key,
            )
        if not config.num_classes:
            logits = self.compute_logits(x_BTD, linear_options=linear_options)
            return ModelOutput(logits, attention_maps)
        if mask_BT is not None:
            x_BTD = x_BTD * mask_BT[..., None].astype(x_BTD.dtype)
        # The mean runs over all T positions, padding included, as the published models do.
        pooled_BD = x_BTD.mean(1)
        if config.num_towers == 2:
            x, y = jnp.moveaxis(pooled_BD.reshape(-1, 2, config.model_dim), 1, 0)
            pooled_BD = jnp.concatenate([x, y, x * y, x - y], -1)
        logits_BC = self.classifier(nnx.relu(self.hidden(pooled_BD)))
        return ModelOutput(logits_BC.astype(jnp.float32), attention_maps)

    def prefill(
        self,
        tokens_BT: jax.Array,
        *,
        cache_length: int | None = None,
        attention_options: AttentionOptions | None = None,
        linear_options: LinearOptions | None = None,
    ) -> tuple[jax.Array, LayerCache]:
        """Read prompts, and keep what later tokens attend to; causal language models only.

        Args:
          tokens_BT: i32[B, T]; what follows a shorter prompt is overwritten before it is seen.
          cache_length: positions of the cache, whole blocks, at least T and at most `max_length`;
            None = `max_length`.
          attention_options: AttentionOptions, static; None = the model's own attribute.
          linear_options: LinearOptions, static; None likewise.

        Returns:
          float[B, T, D], what the head reads (`compute_logits`), and a LayerCache with a leading
          axis of layers.

        Raises:
          ValueError: if the model is no causal language model, or `tokens_BT` has the wrong rank or
            is longer than `max_length`, or `cache_length` is out of range.
        """
        config = self.config
        if not config.causal:
            raise ValueError("only a causal language model reads prompts, got causal=False")
        check_tokens(config, tokens_BT.shape)
        cache_length = config.max_length if cache_length is None else cache_length
        check_cache_length(config, cache_length, num_read=tokens_BT.shape[1])
        options = self._get_options(attention_options, linear_options)

        def apply(block, x_BTD, _, of_layer):
            schedule, budget = of_layer
            lengths = {"budget": budget, "cache_length": cache_length}
            return block.prefill(x_BTD, schedule=schedule, **lengths, **options)

        x_BTD, cache = scan_stack(
            apply,
            self.blocks,
            self._embed(tokens_BT, options["linear_options"]),
            config=config,
            num_layers=config.num_layers,
            keys=(),
            inputs=self._find_blocks(tokens_BT.shape[1], options["attention_options"], None),
        )
        return self._normalise(x_BTD), cache

    def decode(
        self,
        tokens_B: jax.Array,
        cache: LayerCache,
        positions_B: jax.Array,
        *,
        attention_options: AttentionOptions | None = None,
        linear_options: LinearOptions | None = None,
    ) -> tuple[jax.Array, LayerCache]:
        """Read one more token of each example: the logits that a call has for this position.

        Args:
          tokens_B: i32[B].
          cache: what `prefill`, or the last `decode`, returned.
          positions_B: i32[B], of the tokens, within the cache; those before have been read.
          attention_options: AttentionOptions, static, as of `prefill`.
          linear_options: LinearOptions, static, as of `prefill`.

        Returns:
          f32[B, V], and the cache with the new tokens.
        """
        options = self._get_options(attention_options, linear_options)
        x_B1D = self._embed(
            tokens_B[:, None], options["linear_options"], positions_BT=positions_B[:, None]
        )

        def apply(block, x_B1D, _, of_layer):
            cache, budget = of_layer
            return block.decode(x_B1D, cache, positions_B, budget=budget, **options)

        x_B1D, cache = scan_stack(
            apply,
            self.blocks,
            x_B1D,
            config=self.config,
            num_layers=self.config.num_layers,
            keys=(),
            inputs=(cache, make_budgets(options["attention_options"], self.config)),
        )
        x_BD = self._normalise(x_B1D)[:, 0]
        return self.compute_logits(x_BD, linear_options=options["linear_options"]), cache

    def compute_logits(
        self, x: jax.Array, *, linear_options: LinearOptions | None = None
    ) -> jax.Array:
        """Apply the head of a language model.

        Args:
          x: float[..., D], what `prefill` returned.
          linear_options: LinearOptions, static; None = the model's own attribute.

        Returns:
          f32[..., V].
        """
        options = self.linear_options if linear_options is None else linear_options
        if self.config.head_transform:
            x = self.head_transform(x)
        head = self.embedding if self.config.tied_head else self.head
        logits = compute_logits(head, x, options=options)
        return logits + self.head_transform.bias[...] if self.config.head_transform else logits

    def _get_options(self, attention_options, linear_options):
        return {
            "attention_options": attention_options or self.attention_options,
            "linear_options": linear_options or self.linear_options,
        }

    def _normalise(self, x_BTD):
        return self.final_norm(x_BTD) if self.config.norm_position == "pre" else x_BTD

    def _embed(self, tokens, linear_options, *, positions_BT=None):
        config = self.config
        if config.patch_values:
            x_BTD = self.patches(tokens.astype(jnp.float32) / 127.5 - 1)
        else:
            tokens = tokens.reshape(-1, tokens.shape[-1])
            x_BTD = look_up(self.embedding, tokens, options=linear_options)
        if config.positions == "learned":
            table = self.position[...]
            rows = table[None, : x_BTD.shape[1]] if positions_BT is None else table[positions_BT]
            x_BTD = x_BTD + rows.astype(x_BTD.dtype)
        return self.embedding_norm(x_BTD) if config.embedding_norm else x_BTD

    def _apply_blocks(
        self, x_BTD, mask_BT, keys, *, attention_options, linear_options, block_lists, probe
    ):
        config = self.config

        def apply(block, x_BTD, keys, of_layer):
            (dropout_key, pruning_key), (schedule, budget) = keys, of_layer
            return block(
                x_BTD,
                schedule=schedule,
                budget=budget,
                kv_mask_BT=mask_BT,
                dropout_key=dropout_key,
                attention_options=attention_options,
                linear_options=linear_options,
                pruning_key=pruning_key,
                probe=probe,
            )

        return scan_stack(
            apply,
            self.blocks,
            x_BTD,
            config=config,
            num_layers=config.num_layers,
            keys=keys,
            inputs=self._find_blocks(x_BTD.shape[1], attention_options, block_lists),
        )

    def _find_blocks(self, length, options, block_lists):
        """Return the lists of the blocks that the layers keep, or how many each is to choose."""
        by_masks = options.position_mask is None and options.choose_blocks is None
        if not (options.sparse and by_masks and length == self.config.max_length):
            return None, make_budgets(options, self.config)
        if block_lists is None:
            block_lists = make_block_schedule(self.blocks.attention.block_mask[...])
        return block_lists, None
