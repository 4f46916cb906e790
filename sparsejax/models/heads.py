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
from pallas_kernels.meshes import vary_like
from sparsejax.patterns import HeadMaps, PoolMap
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
    **options: Any,
) -> jax.Array:
    """Attend with `block_sparse_attention`, on a mesh each device with its examples and heads.

    Args:
      q_BTNH: float[B, T, N, H].
      k_BSKH: float[B, S, K, H].
      v_BSKH: like k.
      blocks: what is attended to, bool[1 | B, 1 | N, I, J] or the lists of such a mask; None = all.
      kv_mask_BS: bool[B, S], True = may be attended; None = all.
      **options: of `block_sparse_attention`.

    Returns:
      float[B, T, N, H]; on a mesh each device has its positions of the heads of its part.
    """

    def run(q, k, v, blocks, kv_mask):
        return block_sparse_attention(q, k, v, blocks, kv_mask=kv_mask, **options)

    specs = (*[_HEADS_SPEC] * 3, _find_spec(blocks), _POSITIONS_SPEC)
    y_BTNH = map_parts(run, specs, _HEADS_SPEC)(q_BTNH, k_BSKH, v_BSKH, blocks, kv_mask_BS)
    return constrain(y_BTNH, BATCH, "context", "tensor", None)


def _find_spec(blocks: jax.Array | BlockSchedule | None) -> P:
    """Deal out the blocks of examples and heads that have their own."""
    leading = jax.tree.leaves(blocks)[0].shape[:2] if blocks is not None else ()
    return P(*(axes if n > 1 else None for n, axes in zip(leading, (BATCH, HEADS), strict=False)))


def measure_maps(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    kv_mask_BS: jax.Array | None,
    *,
    pool_map: PoolMap | None = None,
    **options: Any,
) -> jax.Array | HeadMaps:
    """Average attention maps over examples and heads, on each device, then over all.

    Where maps of heads are pooled, one head follows the other, so that no more than the map of one
    and the mean are held.

    Args:
      q_BTNH: float[B, T, N, H].
      k_BSKH: float[B, S, K, H].
      kv_mask_BS: bool[B, S], True = may be attended; None = all.
      pool_map: what is made of each head's map; None measures the mean alone.
      **options: of `mean_attention_map`.

    Returns:
      f32[T, S], or HeadMaps.
    """
    cut = is_mapped()

    def measure(q, k, kv_mask):
        if pool_map is None:
            mean_TS = mean_attention_map(q, k, kv_mask_BS=kv_mask, **options)
            return jax.lax.pmean(mean_TS, AXES) if cut else mean_TS
        mean_TS, pooled = _pool_heads(q, k, kv_mask, pool_map, options)
        if cut:
            # Pooling is linear: of each head, devices exchange what is pooled and not its map.
            mean_TS, pooled = jax.lax.pmean(mean_TS, AXES), jax.lax.pmean(pooled, BATCH)
        return mean_TS, pooled

    out_specs = P() if pool_map is None else (P(), P(HEADS))
    measured = map_parts(measure, (_HEADS_SPEC, _HEADS_SPEC, _POSITIONS_SPEC), out_specs)(
        q_BTNH, k_BSKH, kv_mask_BS
    )
    return measured if pool_map is None else HeadMaps(*measured)


def _pool_heads(q_BTNH, k_BSKH, kv_mask_BS, pool_map, options):
    """Return the mean map of a device's heads, and what is made of each one's."""
    # A measurement: a loop that knows of no gradient keeps nothing for one.
    q_BTNH, k_BSKH = jax.lax.stop_gradient((q_BTNH, k_BSKH))
    N, K = q_BTNH.shape[2], k_BSKH.shape[2]

    def add_head(sum_TS, n):
        q_BT1H = jax.lax.dynamic_slice_in_dim(q_BTNH, n, 1, axis=2)
        k_BS1H = jax.lax.dynamic_slice_in_dim(k_BSKH, n // (N // K), 1, axis=2)
        map_TS = mean_attention_map(q_BT1H, k_BS1H, kv_mask_BS=kv_mask_BS, **options)
        return sum_TS + map_TS, pool_map(map_TS)

    nothing_TS = jnp.zeros((q_BTNH.shape[1], k_BSKH.shape[1]), jnp.float32)
    sum_TS, pooled = jax.lax.scan(add_head, vary_like(nothing_TS, q_BTNH), jnp.arange(N))
    return sum_TS / N, pooled
