"""Multi-head attention whose kept blocks are a variable of the module.

Legend: B batch, T query position, S key position, D model width, N query heads, K key/value
heads, H head dim, I query blocks, J key blocks.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import BlockSchedule, Implementation, list_backends
from sparsejax.models.cache import (
    ChosenBlocks,
    LayerCache,
    attend_one,
    choose_next_rows,
    pad_positions,
    write_position,
)
from sparsejax.models.config import TransformerConfig, sparse_weight_patterns
from sparsejax.models.heads import attend, deal_heads, measure_maps, split_heads
from sparsejax.models.linear import apply_linear, make_linear
from sparsejax.models.products import SPARSE_LINEAR, LinearOptions
from sparsejax.models.residual import make_bias_init, make_kernel_inits
from sparsejax.models.rotary import apply_rotary, get_rotary
from sparsejax.models.variables import SparsityMask
from sparsejax.patterns import BlockChooser, BlockPattern, HeadMaps, PoolMap
from sparsejax.types import PyTree


class AttentionOptions(NamedTuple):
    """Static choices of one training phase about attention.

    Attributes:
      sparse: bool, False attends everywhere and ignores the masks.
      pruned_logits: "masked" or "zero", how pruned blocks count in the softmax.
      implementation: which backend runs attention to blocks, None for the best on the device; it
        also runs the probe, whatever attention the phase has, if it has one of its own.
      position_mask: (T) -> bool[T, T], True = kept, positions attended to instead of blocks of the
        masks; dense products, masked. None attends to blocks.
      choose_blocks: chooses blocks for each example and head from queries and keys, instead of
        those of the masks; None takes the masks.
      pool_map: makes something small of each head's map, of which a probe returns it too.
    """

    sparse: bool = True
    pruned_logits: Literal["masked", "zero"] = "masked"
    implementation: Implementation | None = None
    position_mask: Callable[[int], jax.Array] | None = None
    choose_blocks: BlockChooser | None = None
    pool_map: PoolMap | None = None


SPARSE = AttentionOptions()


def make_budgets(options: AttentionOptions, config: TransformerConfig) -> PyTree | None:
    """Return what a chooser of blocks needs to know of each layer.

    Args:
      options: of a call.
      config: of the model.

    Returns:
      `BlockChooser.budget` with a leading axis of layers; None where the options choose nothing.

    Raises:
      ValueError: if the chooser knows another number of layers.
    """
    if not options.sparse or options.choose_blocks is None:
        return None
    num_blocks, _ = config.block.grid(config.max_length)
    budgets = options.choose_blocks.budget(num_blocks, config.num_heads)

    def spread(leaf):
        if len(leaf) not in (1, config.num_layers):
            expected = f"choose_blocks must know of {config.num_layers} layers, or of all alike"
            raise ValueError(f"{expected}, got {len(leaf)}")
        return jnp.broadcast_to(leaf, (config.num_layers, *leaf.shape[1:]))

    return jax.tree.map(spread, budgets)


class BlockSparseAttention(nnx.Module):
    """Self-attention over the blocks that `block_mask` keeps.

    y = concat_n softmax(q_n k_n^T / sqrt(H)) v_n W_o,  restricted to kept blocks

    Attributes:
      qkv: nnx.Linear or SparseLinear, f32[D, (N + 2K) H].
      out: nnx.Linear or SparseLinear, f32[N H, D].
      block_mask: SparsityMask bool[1, 1, I, J], all True at first; assign to it (outside a
        trace) to prune. bool[1, N, I, J] where heads have masks of their own.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        """Create the projections and an all-True block mask.

        Args:
          config: read are its sizes, block, causal, positions, weight patterns, initial values,
            biases and type.
          rngs: nnx.Rngs with a `params` stream.
        """
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.max_length, self.head_dim = config.max_length, config.head_dim
        self.block, self.causal = config.block, config.causal
        self.rotary = get_rotary(config)
        kernel_init, out_kernel_init = make_kernel_inits(config, num_branches=2 * config.num_layers)
        patterns = sparse_weight_patterns(config)
        shared: dict[str, Any] = {
            "use_bias": config.use_bias,
            "bias_init": make_bias_init(config, config.model_dim),
            "dtype": config.dtype,
            "rngs": rngs,
        }
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = make_linear(
            config.model_dim,
            width,
            pattern=patterns.get("attention/qkv"),
            kernel_init=kernel_init,
            **shared,
        )
        self.out = make_linear(
            config.num_heads * config.head_dim,
            config.model_dim,
            pattern=patterns.get("attention/out"),
            kernel_init=out_kernel_init,
            **shared,
        )
        grid = config.block.grid(config.max_length)
        self.block_mask = SparsityMask(jnp.ones((1, 1, *grid), bool))

    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        kv_mask_BT: jax.Array | None = None,
        schedule: BlockSchedule | None = None,
        budget: PyTree | None = None,
        options: AttentionOptions = SPARSE,
        linear_options: LinearOptions = SPARSE_LINEAR,
        pruning_key: jax.Array | None = None,
        probe: bool = False,
    ) -> tuple[jax.Array, jax.Array | HeadMaps | None]:
        """Attend and project.

        Args:
          x_BTD: float[B, T, D]; T at most `max_length`.
          kv_mask_BT: bool[B, T], True = a real token that may be attended; None = all real.
          schedule: what `make_block_schedule` made of the block mask, to share its cost; None
            builds it here. Only for T equal to `max_length`.
          budget: where the options choose blocks, what `BlockChooser.budget` has for this layer.
          options: AttentionOptions, static.
          linear_options: LinearOptions of sparse projections, static.
          pruning_key: typed key; needed where `linear_options` prunes gradients of sparse weights.
          probe: bool, static; also return the attention map.

        Returns:
          float[B, T, D], and f32[T, T], the softmax map averaged over batch and heads, or None;
          HeadMaps where the options pool the map of each head.

        Raises:
          ValueError: if T is above `max_length`.
        """
        self._check_length(x_BTD)
        q_BTNH, k_BSKH, v_BSKH = self._project_heads(x_BTD, linear_options, pruning_key)
        attention_maps = None
        if probe:
            attention_maps = measure_maps(
                q_BTNH,
                k_BSKH,
                kv_mask_BT,
                pool_map=options.pool_map,
                causal=self.causal,
                implementation=_name_of_probe(options.implementation),
            )
        y_BTNH, _ = self._attend_heads(
            q_BTNH, k_BSKH, v_BSKH, kv_mask_BT, (schedule, budget), options
        )
        return self._project_out(y_BTNH, linear_options, pruning_key), attention_maps

    def prefill(
        self,
        x_BTD: jax.Array,
        *,
        schedule: BlockSchedule | None = None,
        budget: PyTree | None = None,
        cache_length: int | None = None,
        options: AttentionOptions = SPARSE,
        linear_options: LinearOptions = SPARSE_LINEAR,
    ) -> tuple[jax.Array, LayerCache]:
        """Attend and project, and keep what later positions will attend to; causal models only.

        Args:
          x_BTD: float[B, T, D]; T at most `max_length`.
          schedule, budget: as of a call.
          cache_length: int, positions of the cache, whole blocks; None = `max_length`.
          options: AttentionOptions, static.
          linear_options: LinearOptions of sparse projections, static.

        Returns:
          float[B, T, D] and LayerCache.
        """
        self._check_length(x_BTD)
        q_BTNH, k_BTKH, v_BTKH = self._project_heads(x_BTD, linear_options, None)
        y_BTNH, kept_BNIJ = self._attend_heads(
            q_BTNH, k_BTKH, v_BTKH, None, (schedule, budget), options
        )
        S, chosen = self.max_length if cache_length is None else cache_length, None
        if kept_BNIJ is not None:
            grid = self.block.grid(S)
            missing = [
                (0, most - size) for most, size in zip(grid, kept_BNIJ.shape[2:], strict=True)
            ]
            kept_BNIJ = jnp.pad(kept_BNIJ, ((0, 0), (0, 0), *missing))
            chosen = ChosenBlocks(pad_positions(q_BTNH, S), kept_BNIJ)
        cache = LayerCache(pad_positions(k_BTKH, S), pad_positions(v_BTKH, S), chosen)
        return self._project_out(y_BTNH, linear_options, None), cache

    def decode(
        self,
        x_B1D: jax.Array,
        cache: LayerCache,
        positions_B: jax.Array,
        *,
        budget: PyTree | None = None,
        options: AttentionOptions = SPARSE,
        linear_options: LinearOptions = SPARSE_LINEAR,
    ) -> tuple[jax.Array, LayerCache]:
        """Attend from one position of each example to those before, which the cache holds.

        Args:
          x_B1D: float[B, 1, D].
          cache: LayerCache of all positions before.
          positions_B: i32[B], of `x_B1D`, within the cache.
          budget: as of a call.
          options: AttentionOptions, static, as of `prefill`.
          linear_options: LinearOptions of sparse projections, static.

        Returns:
          float[B, 1, D], and the LayerCache with the new position.

        Raises:
          ValueError: if the options choose blocks with lookahead.
        """
        if options.choose_blocks is not None and options.choose_blocks.lookahead:
            raise ValueError(
                "choose_blocks must have lookahead=False to decode: later tokens are not there yet"
            )
        q_B1NH, k_B1KH, v_B1KH = self._project_heads(
            x_B1D, linear_options, None, positions_BT=positions_B[:, None]
        )
        k_BSKH = write_position(cache.k_BSKH, k_B1KH, positions_B)
        v_BSKH = write_position(cache.v_BSKH, v_B1KH, positions_B)
        chosen, choose = cache.chosen, options.choose_blocks
        if chosen is not None and choose is not None:
            budget = self._get_budget(choose, budget)
            chosen = choose_next_rows(
                chosen._replace(q_BSNH=write_position(chosen.q_BSNH, q_B1NH, positions_B)),
                k_BSKH,
                positions_B,
                lambda q_BSNH, k_BSKH: choose(q_BSNH, k_BSKH, None, budget),
                self.block.block_q,
            )
        kept_BNS = self._find_kept_positions(chosen, positions_B, k_BSKH.shape[1], options)
        y_BNH = attend_one(
            q_B1NH[:, 0],
            k_BSKH,
            v_BSKH,
            positions_B,
            kept_BNS,
            pruned_logits=options.pruned_logits,
        )
        cache = LayerCache(k_BSKH, v_BSKH, chosen)
        return self._project_out(y_BNH[:, None], linear_options, None), cache

    def _check_length(self, x_BTD):
        if x_BTD.shape[1] > self.max_length:
            raise ValueError(
                f"x_BTD must have at most max_length={self.max_length} positions, "
                f"got {x_BTD.shape=}"
            )

    def _project_heads(self, x_BTD, options, pruning_key, *, positions_BT=None):
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        widths = [count * self.head_dim for count in heads]
        qkv = apply_linear(
            self.qkv,
            x_BTD,
            name="attention/qkv",
            options=options,
            pruning_key=pruning_key,
            split="columns",
            segments=widths,
        )
        q_BTNH, k_BSKH, v_BSKH = split_heads(qkv, widths, self.head_dim)
        if self.rotary:
            q_BTNH, k_BSKH = (
                apply_rotary(x, rotary=self.rotary, positions_BT=positions_BT)
                for x in (q_BTNH, k_BSKH)
            )
        return deal_heads(q_BTNH, k_BSKH, v_BSKH)

    def _attend_heads(self, q_BTNH, k_BSKH, v_BSKH, kv_mask_BT, of_layer, options):
        (B, T), (schedule, budget) = q_BTNH.shape[:2], of_layer
        choose = options.choose_blocks if options.sparse else None
        blocks: jax.Array | BlockSchedule | None = None
        pattern, implementation = self.block, options.implementation
        if choose is None:
            blocks, pattern, implementation = self._find_blocks(T, schedule, options)
        missing = _pad_length(T, pattern) - T
        if missing:
            q_BTNH, k_BSKH, v_BSKH = (
                jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (q_BTNH, k_BSKH, v_BSKH)
            )
            real_BT = jnp.ones((B, T), bool) if kv_mask_BT is None else kv_mask_BT
            kv_mask_BT = jnp.pad(real_BT, ((0, 0), (0, missing)))
        kept_BNIJ = None
        if choose is not None:
            budget = self._get_budget(choose, budget)
            blocks = kept_BNIJ = choose(q_BTNH, k_BSKH, kv_mask_BT, budget)
        # Keys at padded positions come from activations there. Were those, or their products, not
        # finite, gradients of the projections, where they meet zeros, would be NaN whatever
        # attention does. Without gradients a NaN would spread from there: padding has to be finite.
        y_BTNH = attend(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            blocks,
            kv_mask_BT,
            block_q=pattern.block_q,
            block_kv=pattern.block_kv,
            causal=self.causal,
            removed_keys_finite=True,
            pruned_logits=options.pruned_logits,
            implementation=implementation,
        )
        return y_BTNH[:, :T], kept_BNIJ

    def _project_out(self, y_BTNH, options, pruning_key):
        return apply_linear(
            self.out,
            y_BTNH.reshape(*y_BTNH.shape[:2], -1),
            name="attention/out",
            options=options,
            pruning_key=pruning_key,
            split="rows",
        )

    def _get_budget(self, choose, budget):
        if budget is not None:
            return budget
        budgets = choose.budget(self.block.grid(self.max_length)[0], self.num_heads)
        if any(len(leaf) > 1 for leaf in jax.tree.leaves(budgets)):
            raise ValueError("budget must be given where layers have budgets of their own")
        return jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), budgets)

    def _find_kept_positions(self, chosen, positions_B, length, options):
        """Return which positions each head of each example keeps, None for all."""
        if not options.sparse:
            return None
        if options.position_mask is not None:
            return options.position_mask(length)[positions_B][:, None]
        rows_B = positions_B // self.block.block_q
        if chosen is None:
            kept_BNJ = jnp.moveaxis(self.block_mask[...][0][:, rows_B], 1, 0)
        else:
            kept_BNJ = chosen.kept_BNIJ[jnp.arange(len(rows_B)), :, rows_B]
        return jnp.repeat(kept_BNJ, self.block.block_kv, axis=-1)[..., :length]

    def _find_blocks(
        self, length: int, schedule: BlockSchedule | None, options: AttentionOptions
    ) -> tuple[jax.Array | BlockSchedule | None, BlockPattern, Implementation | None]:
        """Return what is attended to, in blocks of which size, and the backend that is named."""
        if not options.sparse:
            # Without a mask one block may cover everything, whatever the length.
            return None, BlockPattern(block_q=length, block_kv=length), None
        if options.position_mask is not None:
            kept = options.position_mask(length)[None, None]
            return kept, BlockPattern(block_q=1, block_kv=1), None
        if schedule is not None:
            return schedule, self.block, options.implementation
        num_q, num_kv = self.block.grid(_pad_length(length, self.block))
        kept = self.block_mask[...][:, :, :num_q, :num_kv]
        return kept, self.block, options.implementation


def _name_of_probe(implementation: Implementation | None) -> Implementation | None:
    return implementation if implementation in list_backends("mean_attention_map") else None


def _pad_length(length: int, block: BlockPattern) -> int:
    """Return the next length that whole blocks fill on both sides."""
    return length + -length % math.lcm(block.block_q, block.block_kv)
