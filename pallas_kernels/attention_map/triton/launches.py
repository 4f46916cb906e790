"""The two kernels of the mean map as functions of arrays, which vmap may batch.

Letters: B T S N K H as everywhere (`sparsejax.types`); M maps, of which each has its examples.
"""

import dataclasses
import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention_map.triton.tiles import Tiles
from pallas_kernels.block_sparse_attention.triton.launches import LOG2_E, pad_head_dim
from pallas_kernels.triton.launch import launch
from pallas_kernels.triton.tile_tables import Tile

# Tiles of queries that are taken together before the next tile of keys, for the cache.
_GROUP = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What the kernels are compiled for, sizes aside.

    Attributes:
      causal: bool, query t sees keys 0..t.
      capability: (major, minor), compute capability.
      tiles: Tiles of the kernels.
      parts: int, into which the examples and heads of a map are divided.
    """

    causal: bool
    capability: tuple[int, int]
    tiles: Tiles
    parts: int


class Operands(NamedTuple):
    """What the kernels read.

    Attributes:
      q: float[M * B, T, N, H].
      k: float[M * B, S, K, H].
      kv_mask: int8[M * B, S] or None, 0 removes a key.
      lse: f32[M * B, N, T] in base 2, +inf for rows that add nothing; None where it is computed.
    """

    q: jax.Array
    k: jax.Array
    kv_mask: jax.Array | None
    lse: jax.Array | None = None


def sum_exponentials(operands: Operands, problem: Problem) -> jax.Array:
    """Launch the kernel of the log-sum-exp.

    Returns:
      f32[M * B, N, T] in base 2, +inf for queries that see no key.
    """

    @jax.custom_batching.custom_vmap
    def run(operands):
        return _sum_exponentials(operands, problem)

    @run.def_vmap
    def run_batched(axis_size, in_batched, operands):
        lse = sum_exponentials(_fold(axis_size, in_batched[0], operands), problem)
        return lse.reshape(axis_size, -1, *lse.shape[1:]), True

    return run(operands)


def average(operands: Operands, problem: Problem, *, maps: int = 1) -> jax.Array:
    """Launch the kernel of the mean map. A batch of calls is one launch, of as many maps.

    Args:
      maps: int, M.

    Returns:
      f32[M, T, S].
    """

    @jax.custom_batching.custom_vmap
    def run(operands):
        return _average(operands, problem, maps)

    @run.def_vmap
    def run_batched(axis_size, in_batched, operands):
        operands = _fold(axis_size, in_batched[0], operands)
        out = average(operands, problem, maps=axis_size * maps)
        return out.reshape(axis_size, maps, *out.shape[1:]), True

    return run(operands)


def _sum_exponentials(operands, problem):
    # Imported where it is launched: kernels need the extra.
    from pallas_kernels.attention_map.triton import kernels

    q, tile = operands.q, problem.tiles.lse
    examples, num_queries, num_heads, _ = q.shape
    results = launch(
        kernels.attention_log_sum_exp,
        {"q": q, "k": operands.k, "kv_mask": operands.kv_mask},
        {"lse": jax.ShapeDtypeStruct((examples, num_heads, num_queries), jnp.float32)},
        _name_constants(operands, problem, tile),
        programs=examples * num_heads * -(-num_queries // tile.rows),
        tile=tile,
        capability=problem.capability,
        takes_all_registers=True,
    )
    return results["lse"]


def _average(operands, problem, maps):
    from pallas_kernels.attention_map.triton import kernels

    q, tile, parts = operands.q, problem.tiles.mean, problem.parts
    num_queries, num_keys = q.shape[1], operands.k.shape[1]
    batch = q.shape[0] // maps
    results = launch(
        kernels.mean_attention_map,
        operands._asdict(),
        {"out": jax.ShapeDtypeStruct((maps, parts, num_queries, num_keys), jnp.float32)},
        _name_constants(operands, problem, tile)
        | {"B": batch, "PARTS": parts, "GROUP": _GROUP, "SHARE": 1 / (batch * q.shape[2])},
        programs=maps * parts * count_tiles(num_queries, num_keys, tile),
        tile=tile,
        capability=problem.capability,
        takes_all_registers=True,
    )
    # One after the other: a sum of XLA's own may have another order.
    return functools.reduce(operator.add, (results["out"][:, part] for part in range(parts)))


def count_tiles(num_queries: int, num_keys: int, tile: Tile) -> int:
    """Return how many tiles cover a map.

    Example:
      >>> count_tiles(100, 64, Tile(64, 64, 4, 2))
      2
    """
    return -(-num_queries // tile.rows) * -(-num_keys // tile.columns)


def _name_constants(operands: Operands, problem: Problem, tile: Tile) -> dict[str, Any]:
    (_, num_queries, num_heads, head_dim), kv_shape = operands.q.shape, operands.k.shape
    return {
        "T": num_queries,
        "S": kv_shape[1],
        "N": num_heads,
        "K": kv_shape[2],
        "H": head_dim,
        "PAD": pad_head_dim(head_dim),
        "BQ": tile.rows,
        "BK": tile.columns,
        "SCALE": head_dim**-0.5 * LOG2_E,
        "CAUSAL": problem.causal,
        "KEY_MASK": operands.kv_mask is not None,
    }


def _fold(axis_size: int, in_batched: Operands, operands: Operands) -> Operands:
    """Let an axis that vmap brings join the examples."""

    def fold(x, is_batched):
        if not is_batched:
            x = jnp.broadcast_to(x, (axis_size, *x.shape))
        return x.reshape(-1, *x.shape[2:])

    return jax.tree.map(fold, operands, in_batched)
