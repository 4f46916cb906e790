"""Multi-head attention whose kept blocks are a variable of the module.

Legend: B batch, T query position, S key position, D model width, N query heads, K key/value
heads, H head dim, I query blocks, J key blocks.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from pallas_kernels import (
    BlockSchedule,
    Implementation,
    block_sparse_attention,
    list_backends,
    mean_attention_map,
)
from sparsejax.models.config import TransformerConfig, sparse_weight_patterns
from sparsejax.models.linear import apply_linear, make_linear
from sparsejax.models.products import SPARSE_LINEAR, LinearOptions
from sparsejax.models.residual import make_bias_init, make_kernel_inits
from sparsejax.models.rotary import apply_rotary, get_rotary
from sparsejax.models.variables import SparsityMask
from sparsejax.patterns import BlockPattern
from sparsejax.sharding import (
    AXES,
    BATCH,
    HEADS,
    constrain,
    get_sizes,
    is_mapped,
    map_parts,
    split_dealt,
)


class AttentionOptions(NamedTuple):
    """Static choices of one training phase about attention.

    Attributes:
      sparse: bool, False attends everywhere and ignores the masks.
      pruned_logits: "masked" or "zero", how pruned blocks count in the softmax.
      implementation: which backend runs attention to blocks, None for the best on the device; it
        also runs the probe, whatever attention the phase has, if it has one of its own.
      position_mask: (T) -> bool[T, T], True = kept, positions attended to instead of blocks of the
        masks; dense products, masked. None attends to blocks.
    """

    sparse: bool = True
    pruned_logits: Literal["masked", "zero"] = "masked"
    implementation: Implementation | None = None
    position_mask: Callable[[int], jax.Array] | None = None


SPARSE = AttentionOptions()


class BlockSparseAttention(nnx.Module):
    """Self-attention over the blocks that `block_mask` keeps.

    y = concat_n softmax(q_n k_n^T / sqrt(H)) v_n W_o,  restricted to kept blocks

    Attributes:
      qkv: nnx.Linear or SparseLinear, f32[D, (N + 2K) H].
      out: nnx.Linear or SparseLinear, f32[N H, D].
      block_mask: SparsityMask bool[1, 1, I, J], all True at first; assign to it (outside a
        trace) to prune.
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
        options: AttentionOptions = SPARSE,
        linear_options: LinearOptions = SPARSE_LINEAR,
        pruning_key: jax.Array | None = None,
        probe: bool = False,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Attend and project.

        Args:
          x_BTD: float[B, T, D]; T at most `max_length`.
          kv_mask_BT: bool[B, T], True = a real token that may be attended; None = all real.
          schedule: what `make_block_schedule` made of the block mask, to share its cost; None
            builds it here. Only for T equal to `max_length`.
          options: AttentionOptions, static.
          linear_options: LinearOptions of sparse projections, static.
          pruning_key: typed key; needed where `linear_options` prunes gradients of sparse weights.
          probe: bool, static; also return the attention map.

        Returns:
          float[B, T, D], and f32[T, T], the softmax map averaged over batch and heads, or None.

        Raises:
          ValueError: if T is above `max_length`.
        """
        B, T, _ = x_BTD.shape
        if x_BTD.shape[1] > self.max_length:
            raise ValueError(
                f"x_BTD must have at most max_length={self.max_length} positions, "
                f"got {x_BTD.shape=}"
            )
        project = functools.partial(apply_linear, options=linear_options, pruning_key=pruning_key)
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        widths = [count * self.head_dim for count in heads]
        qkv = project(self.qkv, x_BTD, name="attention/qkv", split="columns", segments=widths)
        q_BTNH, k_BSKH, v_BSKH = split_heads(qkv, widths, self.head_dim)
        if self.rotary:
            q_BTNH, k_BSKH = (apply_rotary(x, rotary=self.rotary) for x in (q_BTNH, k_BSKH))
        q_BTNH, k_BSKH, v_BSKH = deal_heads(q_BTNH, k_BSKH, v_BSKH)
        attention_map_TS = None
        if probe:
            attention_map_TS = _average_map(
                q_BTNH,
                k_BSKH,
                kv_mask_BT,
                causal=self.causal,
                implementation=_name_of_probe(options.implementation),
            )
        blocks, pattern, implementation = self._choose_blocks(T, schedule, options)
        missing = _pad_length(T, pattern) - T
        if missing:
            q_BTNH, k_BSKH, v_BSKH = (
                jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (q_BTNH, k_BSKH, v_BSKH)
            )
            real_BT = jnp.ones((B, T), bool) if kv_mask_BT is None else kv_mask_BT
            kv_mask_BT = jnp.pad(real_BT, ((0, 0), (0, missing)))
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
        )[:, :T]
        y_BTD = project(self.out, y_BTNH.reshape(B, T, -1), name="attention/out", split="rows")
        return y_BTD, attention_map_TS

    def _choose_blocks(
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


_HEADS_SPEC, _POSITIONS_SPEC = P(BATCH, None, HEADS, None), P(BATCH, None)


def split_heads(y_BTW: jax.Array, widths: Sequence[int], head_dim: int) -> Iterator[jax.Array]:
    """Split the columns of a projection into heads.

    Args:
      y_BTW: float[B, T, W]; on a mesh its columns are dealt, see `deal_columns`.
      widths: columns of queries, keys or values, whose sum is W.
      head_dim: int, H.

    Yields:
      float[B, T, heads, H] for each width.
    """
    B, T, _ = y_BTW.shape
    for part in split_dealt(y_BTW, widths, get_sizes()["tensor"]):
        yield constrain(part.reshape(B, T, -1, head_dim), BATCH, "context", "tensor", None)


def deal_heads(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Give each device all positions of its heads; without a mesh, return what is given.

    Key/value heads that "context" does not divide further are gathered, and repeated until it does.

    Args:
      q_BTNH: float[B, T, N, H].
      k_BSKH: float[B, S, K, H].
      v_BSKH: like k.

    Returns:
      tuple of queries, keys and values, with as many heads as devices divide.
    """
    sizes = get_sizes()
    parts, kv_heads = math.prod(sizes[name] for name in HEADS), k_BSKH.shape[2]
    times = math.lcm(parts, kv_heads) // kv_heads
    if times > 1:
        k_BSKH, v_BSKH = (
            jnp.repeat(constrain(x, BATCH, None, "tensor", None), times, axis=2)
            for x in (k_BSKH, v_BSKH)
        )
    q_BTNH, k_BSKH, v_BSKH = (constrain(x, *_HEADS_SPEC) for x in (q_BTNH, k_BSKH, v_BSKH))
    return q_BTNH, k_BSKH, v_BSKH


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    blocks: jax.Array | BlockSchedule | None,
    kv_mask_BS: jax.Array | None,
    **options: Any,
) -> jax.Array:
    """Attend with `block_sparse_attention`, on a mesh each device with its examples and heads.

    Args:
      q_BTNH: float[B, T, N, H].
      k_BSKH: float[B, S, K, H].
      v_BSKH: like k.
      blocks: what is attended to, alike for all examples and heads.
      kv_mask_BS: bool[B, S], True = may be attended; None = all.
      **options: of `block_sparse_attention`.

    Returns:
      float[B, T, N, H]; on a mesh each device has its positions of the heads of its part.
    """

    def run(q, k, v, blocks, kv_mask):
        return block_sparse_attention(q, k, v, blocks, kv_mask=kv_mask, **options)

    specs = (_HEADS_SPEC, _HEADS_SPEC, _HEADS_SPEC, P(), _POSITIONS_SPEC)
    y_BTNH = map_parts(run, specs, _HEADS_SPEC)(q_BTNH, k_BSKH, v_BSKH, blocks, kv_mask_BS)
    return constrain(y_BTNH, BATCH, "context", "tensor", None)


def _average_map(q_BTNH, k_BSKH, kv_mask_BS, **options):
    """Average on each device, then over all."""

    def average(q, k, kv_mask):
        found = mean_attention_map(q, k, kv_mask_BS=kv_mask, **options)
        return jax.lax.pmean(found, AXES) if cut else found

    cut = is_mapped()
    return map_parts(average, (_HEADS_SPEC, _HEADS_SPEC, _POSITIONS_SPEC), P())(
        q_BTNH, k_BSKH, kv_mask_BS
    )


def _name_of_probe(implementation: Implementation | None) -> Implementation | None:
    return implementation if implementation in list_backends("mean_attention_map") else None


def _pad_length(length: int, block: BlockPattern) -> int:
    """Return the next length that whole blocks fill on both sides."""
    return length + -length % math.lcm(block.block_q, block.block_kv)
