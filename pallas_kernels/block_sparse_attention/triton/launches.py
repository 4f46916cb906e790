"""The three attention kernels as functions of arrays, which vmap may batch.

Letters: B T S N K H I J as everywhere (`sparsejax.types`).
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.triton.lists import Lists, make_order
from pallas_kernels.block_sparse_attention.triton.tiles import Tiles
from pallas_kernels.triton.batching import fold_vmap, repeat_shared
from pallas_kernels.triton.launch import launch
from pallas_kernels.triton.tile_tables import Tile

LOG2_E = math.log2(math.e)
"""Softmax is computed in base 2: 2^(x log2 e) = e^x."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What the kernels are compiled for, sizes and masks of positions aside.

    Attributes:
      block_q: int, queries of a block of the pattern.
      block_kv: int, keys of a block of the pattern.
      causal: bool, query t sees keys 0..t.
      scale: float, factor of the logits.
      zero_logits: bool, whether pruned positions count in the softmax.
      capability: (major, minor), compute capability.
      tiles: Tiles of the kernels.
    """

    block_q: int
    block_kv: int
    causal: bool
    scale: float
    zero_logits: bool
    capability: tuple[int, int]
    tiles: Tiles


class Operands(NamedTuple):
    """What the kernels read beside lists; the last four are of the backward pass or may be absent.

    Attributes:
      q: float[B, T, N, H].
      k: float[B, S, K, H]; finite everywhere, as are the values.
      v: float[B, S, K, H].
      kv_mask: int8[B, S] or None, 0 removes a key.
      segments: int32[B, T] or None.
      d_out: float[B, T, N, H] or None, cotangent of the output.
      lse: f32[B, N, T] or None, log-sum-exp in base 2, +inf for rows that counted nothing.
      delta: f32[B, N, T] or None.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    kv_mask: jax.Array | None
    segments: jax.Array | None
    d_out: jax.Array | None = None
    lse: jax.Array | None = None
    delta: jax.Array | None = None


def pad_head_dim(head_dim: int) -> int:
    """Return the width of the tiles that hold a head dim, a power of two.

    Example:
      >>> pad_head_dim(64), pad_head_dim(80)
      (64, 128)
    """
    return 1 << (head_dim - 1).bit_length()


def attend(
    operands: Operands, lists: Lists, problem: Problem
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Launch the forward kernel.

    Args:
      lists: Lists of the query blocks.

    Returns:
      tuple of out, shaped like q, in f32 if pruned positions are still to be counted, else typed
      like q; log-sum-exp f32[B, N, T] in base 2, -inf for queries without a key; and, if pruned
      positions count, int32[B, N, T], how many positions each query sees in its blocks.
    """
    return fold_vmap(functools.partial(_attend, problem=problem))(operands, lists)


def differentiate_queries(operands: Operands, lists: Lists, problem: Problem) -> jax.Array:
    """Launch the kernel of dQ.

    Args:
      lists: Lists of the query blocks.

    Returns:
      dq, shaped and typed like q.
    """
    return fold_vmap(functools.partial(_differentiate_queries, problem=problem))(operands, lists)


def differentiate_keys(
    operands: Operands, lists: Lists, problem: Problem
) -> tuple[jax.Array, jax.Array]:
    """Launch the kernel of dK and dV.

    Args:
      lists: Lists of the key blocks.

    Returns:
      tuple of dk and dv, shaped and typed like k and v.
    """
    return fold_vmap(functools.partial(_differentiate_keys, problem=problem))(operands, lists)


def _attend(operands, lists, problem):
    # Imported where it is launched: kernels need the extra.
    from pallas_kernels.block_sparse_attention.triton import forward_kernel

    operands = repeat_shared(operands)
    q = operands.q
    batch, num_queries, num_heads, _ = q.shape
    rows = (batch, num_heads, num_queries)
    counts_zeros = problem.zero_logits
    results = launch(
        forward_kernel.block_sparse_attention_forward,
        _name_inputs(operands, lists, num_heads, backward=False),
        {
            "out": jax.ShapeDtypeStruct(q.shape, jnp.float32 if counts_zeros else q.dtype),
            "lse": jax.ShapeDtypeStruct(rows, jnp.float32),
            "kept": jax.ShapeDtypeStruct(rows, jnp.int32) if counts_zeros else None,
        },
        _name_constants(operands, lists, problem, problem.tiles.forward, keys=False)
        | {"COUNT": counts_zeros},
        programs=batch * num_heads * (num_queries // problem.tiles.forward.rows),
        tile=problem.tiles.forward,
        capability=problem.capability,
        takes_all_registers=True,
    )
    return results["out"], results["lse"], results.get("kept")


def _differentiate_queries(operands, lists, problem):
    from pallas_kernels.block_sparse_attention.triton import backward_kernels

    operands = repeat_shared(operands)
    q = operands.q
    batch, num_queries, num_heads, _ = q.shape
    results = launch(
        backward_kernels.block_sparse_attention_backward_queries,
        _name_inputs(operands, lists, num_heads, backward=True),
        {"dq": jax.ShapeDtypeStruct(q.shape, q.dtype)},
        _name_constants(operands, lists, problem, problem.tiles.queries, keys=False)
        | {"FACTOR": problem.scale},
        programs=batch * num_heads * (num_queries // problem.tiles.queries.rows),
        tile=problem.tiles.queries,
        capability=problem.capability,
        takes_all_registers=True,
    )
    return results["dq"]


def _differentiate_keys(operands, lists, problem):
    from pallas_kernels.block_sparse_attention.triton import backward_kernels

    operands = repeat_shared(operands)
    k = operands.k
    batch, num_keys, num_kv_heads, _ = k.shape
    like_k = jax.ShapeDtypeStruct(k.shape, k.dtype)
    results = launch(
        backward_kernels.block_sparse_attention_backward_keys,
        _name_inputs(operands, lists, num_kv_heads, backward=True),
        {"dk": like_k, "dv": like_k},
        _name_constants(operands, lists, problem, problem.tiles.keys, keys=True)
        | {"FACTOR": problem.scale},
        programs=batch * num_kv_heads * (num_keys // problem.tiles.keys.rows),
        tile=problem.tiles.keys,
        capability=problem.capability,
        takes_all_registers=True,
    )
    return results["dk"], results["dv"]


def _name_inputs(operands, lists, heads, *, backward):
    arrays = operands._asdict()
    if not backward:
        arrays = {name: x for name, x in arrays.items() if name not in ("d_out", "lse", "delta")}
    return {
        **arrays,
        "order": make_order(lists.counts, heads=heads),
        "counts": lists.counts,
        "leading": lists.leading,
        "indices": lists.indices,
    }


def _name_constants(
    operands: Operands, lists: Lists, problem: Problem, tile: Tile, *, keys: bool
) -> dict[str, Any]:
    (batch, num_queries, num_heads, head_dim), kv_shape = operands.q.shape, operands.k.shape
    has_kv_mask, has_segments = operands.kv_mask is not None, operands.segments is not None
    all_masked = has_kv_mask or has_segments
    return {
        "B": batch,
        "T": num_queries,
        "S": kv_shape[1],
        "N": num_heads,
        "K": kv_shape[2],
        "H": head_dim,
        "PAD": pad_head_dim(head_dim),
        "MB": lists.counts.shape[0],
        "MN": lists.counts.shape[1],
        "PQ": problem.block_q,
        "PK": problem.block_kv,
        "BQ": tile.columns if keys else tile.rows,
        "BK": tile.rows if keys else tile.columns,
        "SCALE": problem.scale * LOG2_E,
        "CAUSAL": problem.causal,
        "KEY_MASK": has_kv_mask,
        "SEGMENTS": has_segments,
        "CLEAR": not all_masked,
        "MASKED": problem.causal or all_masked,
    }
