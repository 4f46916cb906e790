"""Queries, keys and values by heads, and attention to them, on a mesh each device with its part.

Legend: B batch, T query position, S key position, N query heads, K key/value heads, H head dim,
W columns of a projection, I query blocks, J key blocks.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pallas_kernels import BlockSchedule, block_sparse_attention, mean_attention_map
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
    *,
    by_input: bool = False,
    **options: Any,
) -> jax.Array:
    """Attend with `block_sparse_attention`, on a mesh each device with its examples and heads.

    Args:
      q_BTNH: float[B, T, N, H].
      k_BSKH: float[B, S, K, H].
      v_BSKH: like k.
      blocks: what is attended to, alike for all examples and heads; bool[B, N, I, J] `by_input`.
      kv_mask_BS: bool[B, S], True = may be attended; None = all.
      by_input: bool, static; each example and head has blocks of its own.
      **options: of `block_sparse_attention`.

    Returns:
      float[B, T, N, H]; on a mesh each device has its positions of the heads of its part.
    """

    def run(q, k, v, blocks, kv_mask):
        return block_sparse_attention(q, k, v, blocks, kv_mask=kv_mask, **options)

    specs = (*[_HEADS_SPEC] * 3, P(BATCH, HEADS) if by_input else P(), _POSITIONS_SPEC)
    y_BTNH = map_parts(run, specs, _HEADS_SPEC)(q_BTNH, k_BSKH, v_BSKH, blocks, kv_mask_BS)
    return constrain(y_BTNH, BATCH, "context", "tensor", None)


def average_map(
    q_BTNH: jax.Array, k_BSKH: jax.Array, kv_mask_BS: jax.Array | None, **options: Any
) -> jax.Array:
    """Average attention maps over examples and heads, on each device, then over all.

    Args:
      q_BTNH: float[B, T, N, H].
      k_BSKH: float[B, S, K, H].
      kv_mask_BS: bool[B, S], True = may be attended; None = all.
      **options: of `mean_attention_map`.

    Returns:
      f32[T, S].
    """

    def average(q, k, kv_mask):
        found = mean_attention_map(q, k, kv_mask_BS=kv_mask, **options)
        return jax.lax.pmean(found, AXES) if cut else found

    cut = is_mapped()
    return map_parts(average, (_HEADS_SPEC, _HEADS_SPEC, _POSITIONS_SPEC), P())(
        q_BTNH, k_BSKH, kv_mask_BS
    )
