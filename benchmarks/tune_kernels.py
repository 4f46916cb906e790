"""The kernels in Triton that can be tuned: what they run, and which tiles are worth timing."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.compiled_kernels import find_block_bytes
from pallas_kernels.attention_map.call import MapFacts
from pallas_kernels.attention_map.triton import launches as map_launches
from pallas_kernels.attention_map.triton import mean_map
from pallas_kernels.block_sparse_attention.block_schedule import make_block_schedule
from pallas_kernels.block_sparse_attention.call import AttentionFacts
from pallas_kernels.block_sparse_attention.triton.attention import make_problem
from pallas_kernels.block_sparse_attention.triton.launches import (
    Operands,
    attend,
    differentiate_keys,
    differentiate_queries,
)
from pallas_kernels.block_sparse_attention.triton.lists import make_key_lists, make_query_lists
from pallas_kernels.block_sparse_matmul.triton import products
from pallas_kernels.block_sparse_matmul.triton.tiles import ProductTile
from pallas_kernels.block_sparse_matmul.triton.tiles import find_tiles as find_product_tiles
from pallas_kernels.doctor.problem import draw_blocks
from pallas_kernels.doctor.timing import make_random
from pallas_kernels.nm_matmul import packing
from pallas_kernels.nm_matmul.triton import products as sparse_products
from pallas_kernels.nm_matmul.triton.tiles import SparseTile, find_product_tile
from pallas_kernels.transposable_mask.triton.search import search
from pallas_kernels.transposable_mask.triton.tiles import find_tile as find_search_tile
from pallas_kernels.triton.tile_tables import Cut, Tile

# What barriers and reductions take of shared memory beside the tiles.
_SPARE_BYTES = 8192
TUNED_OPS = (
    "block_sparse_attention", "block_sparse_matmul", "nm_matmul", "transposable_mask",
    "mean_attention_map",
)  # fmt: skip


class Kernel(NamedTuple):
    """A kernel and an entry of its table.

    Attributes:
      op: name of the op.
      tile: name of the tile, a field of the op's `Tiles`; "" where there is one tile alone.
      key: of the table, written as in the source.
      default: the tile that the table has.
      candidates: tiles to be timed.
      make: () -> arguments, random arrays.
      run: (tile, *arguments) -> result.
    """

    op: str
    tile: str
    key: str
    default: Cut
    candidates: tuple[Cut, ...]
    make: Callable[[], tuple]
    run: Callable[..., Any]


def list_kernels(capability: tuple[int, int]) -> list[Kernel]:
    """List the kernels and keys to be tuned, the most used first.

    Args:
      capability: (major, minor), of the device.
    """
    attention = [
        kernel
        for dtype, head_dim in (
            ("bfloat16", 64),
            ("bfloat16", 128),
            ("bfloat16", 256),
            ("float32", 64),
            ("float32", 128),
        )
        for kernel in _list_attention(capability, dtype, head_dim)
    ]
    matmul = [
        kernel
        for dtype in ("bfloat16", "float32")
        for kernel in _list_block_matmul(capability, dtype)
    ]
    maps = [
        kernel
        for dtype, head_dim in (("bfloat16", 64), ("bfloat16", 128), ("float32", 64))
        for kernel in _list_map(capability, dtype, head_dim)
    ]
    others = [*_list_nm_matmul(capability), *_list_transposable(capability), *maps]
    return [*attention[:6], *matmul[:3], *others, *attention[6:], *matmul[3:]]


def _find_shared_bytes(capability: tuple[int, int]) -> int:
    """Return what the tiles of a block may take."""
    return find_block_bytes(capability) - _SPARE_BYTES


def _list_attention(
    capability: tuple[int, int], dtype: str, head_dim: int, length: int = 4096, heads: int = 16
) -> Iterator[Kernel]:
    block = 128
    facts = AttentionFacts(
        batch=1, num_queries=length, num_keys=length, num_heads=heads, num_kv_heads=heads,
        head_dim=head_dim, dtype=dtype, mask_shape=(1, 1), block_q=block, block_kv=block,
        causal=True, has_kv_mask=False, has_segments=False, scale=head_dim**-0.5,
        pruned_logits="masked", return_lse=False,
    )  # fmt: skip
    problem = make_problem(facts)
    itemsize = jnp.dtype(dtype).itemsize
    lists = {"block_q": block, "block_kv": block, "causal": True, "all_masked": False}

    def make() -> tuple:
        x = jax.ShapeDtypeStruct((1, length, heads, head_dim), dtype)
        q, k, v, d_out = make_random((x, x, x, x))
        grid = (length // block, length // block)
        mask = (draw_blocks((1, 1, *grid), 0.3) | jnp.eye(grid[0], dtype=bool)) & jnp.tri(
            grid[0], dtype=bool
        )
        schedule = make_block_schedule(mask)
        query_lists, key_lists = (f(schedule, **lists) for f in (make_query_lists, make_key_lists))
        operands = Operands(q, k, v, None, None)
        out, lse, _ = attend(operands, query_lists, problem)
        delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
        # The log-sum-exp of the forward kernel is in base 2, as the backward kernels take it.
        return operands._replace(d_out=d_out, lse=lse, delta=delta), query_lists, key_lists

    def run(function, name, cut, operands, query_lists, key_lists):
        tiles = problem.tiles._replace(**{name: cut})
        return function(
            operands,
            key_lists if name == "keys" else query_lists,
            dataclasses.replace(problem, tiles=tiles),
        )

    for name, function in (
        ("forward", attend),
        ("queries", differentiate_queries),
        ("keys", differentiate_keys),
    ):
        candidates = [
            Tile(rows, columns, warps, stages)
            for rows, columns, warps, stages in itertools.product(
                (16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)
            )
            # Tall tiles read the other side less often; few threads cannot hold large ones.
            if rows >= columns
            and 16 * warps <= rows * columns * head_dim // 2**11 <= 1024 * warps // 4
            and (rows + 2 * columns * stages) * head_dim * itemsize
            <= _find_shared_bytes(capability)
        ]
        yield Kernel(
            op="block_sparse_attention",
            tile=name,
            key=f"({itemsize}, {head_dim})",
            default=getattr(problem.tiles, name),
            candidates=tuple(candidates),
            make=make,
            run=functools.partial(run, function, name),
        )


def _list_block_matmul(
    capability: tuple[int, int],
    dtype: str,
    tokens: int = 8192,
    shape: tuple[int, int] = (4096, 4096),
) -> Iterator[Kernel]:
    side = 128
    itemsize = jnp.dtype(dtype).itemsize
    tiles = find_product_tiles(capability, itemsize, tokens=tokens, block=(side, side))

    def make() -> tuple:
        x, w, dy = make_random(
            tuple(
                jax.ShapeDtypeStruct(s, dtype)
                for s in ((tokens, shape[0]), shape, (tokens, shape[1]))
            )
        )
        return x, w, dy, draw_blocks((shape[0] // side, shape[1] // side), 0.1)

    def run(name, cut, x, w, dy, mask):
        options = {"tile": cut, "capability": capability}
        if name == "forward":
            return products.multiply(x, w, mask, None, **options)
        if name == "transposed":
            return products.multiply_transposed(dy, w, mask, **options)
        return products.multiply_gradient(x, dy, mask, **options)

    candidates = tuple(
        ProductTile(rows, columns, depth, warps, stages)
        for rows, columns, depth, warps, stages in itertools.product(
            (64, 128), (64, 128), (32, 64), (4, 8), (2, 3, 4, 5)
        )
        if (rows + columns) * depth * itemsize * stages <= _find_shared_bytes(capability)
    )
    for name, default in tiles._asdict().items():
        yield Kernel(
            op="block_sparse_matmul",
            tile=name,
            key=str(itemsize),
            default=default,
            candidates=candidates,
            make=make,
            run=functools.partial(run, name),
        )


def _list_nm_matmul(
    capability: tuple[int, int], tokens: int = 8192, shape: tuple[int, int] = (4096, 4096)
) -> Iterator[Kernel]:
    def make() -> tuple:
        w, x = make_random(
            (
                jax.ShapeDtypeStruct(shape, jnp.bfloat16),
                jax.ShapeDtypeStruct((tokens, shape[1]), jnp.bfloat16),
            )
        )
        mask = jax.random.uniform(jax.random.key(0), (shape[0], shape[1] // 4, 4))
        kept = mask.argsort(axis=-1).argsort(axis=-1) < 2
        return packing.compress(w, kept.reshape(shape)), x

    def run(cut, sparse, x):
        return sparse_products.multiply(sparse, x, cut=cut)

    candidates = tuple(
        tile
        for rows, columns, along_rows, along_columns, stages in itertools.product(
            (64, 128, 256), (64, 128, 256), (1, 2, 4), (1, 2, 4), (2, 3, 4, 5)
        )
        # Sums of at most 128 registers a thread, in at least four warps.
        if 4 <= along_rows * along_columns <= 8
        and rows * columns <= 4096 * along_rows * along_columns
        and (tile := SparseTile(rows, columns, along_rows, along_columns, stages)).shared_bytes
        <= _find_shared_bytes(capability)
    )
    yield Kernel(
        op="nm_matmul",
        tile="product",
        key="all",
        default=find_product_tile(capability, rows=shape[0], columns=tokens, divides_columns=False),
        candidates=candidates,
        make=make,
        run=run,
    )


def _list_map(
    capability: tuple[int, int], dtype: str, head_dim: int, length: int = 2048, heads: int = 16
) -> Iterator[Kernel]:
    facts = MapFacts(
        num_queries=length, num_keys=length, head_dim=head_dim, dtype=dtype, causal=False
    )
    problem = mean_map.make_problem(facts)
    itemsize = jnp.dtype(dtype).itemsize

    def make() -> tuple:
        x = jax.ShapeDtypeStruct((1, length, heads, head_dim), dtype)
        operands = map_launches.Operands(*make_random((x, x)), kv_mask=None)
        return (operands._replace(lse=map_launches.sum_exponentials(operands, problem)),)

    def run(name, cut, operands):
        chosen = dataclasses.replace(problem, tiles=problem.tiles._replace(**{name: cut}))
        if name == "mean":
            return map_launches.average(operands, chosen)
        return map_launches.sum_exponentials(operands._replace(lse=None), chosen)

    candidates = tuple(
        Tile(rows, columns, warps, stages)
        for rows, columns, warps, stages in itertools.product(
            (32, 64, 128), (32, 64, 128), (4, 8), (2, 3)
        )
        # Few threads cannot hold the sums of a large tile.
        if rows * columns <= 2048 * warps
        and (rows + columns) * stages * head_dim * itemsize <= _find_shared_bytes(capability)
    )
    for name, default in problem.tiles._asdict().items():
        yield Kernel(
            op="mean_attention_map",
            tile=name,
            key=f"({itemsize}, {head_dim})",
            default=default,
            candidates=candidates,
            make=make,
            run=functools.partial(run, name),
        )


def _list_transposable(
    capability: tuple[int, int], shape: tuple[int, int] = (4096, 4096)
) -> Iterator[Kernel]:
    def make() -> tuple:
        return (make_random(jax.ShapeDtypeStruct(shape, jnp.float32)),)

    def run(cut, w):
        return search(w, tile=cut, capability=capability)

    candidates = tuple(
        Tile(4, columns, warps, 1)
        for columns, warps in itertools.product((256, 512, 1024, 2048), (2, 4, 8))
        # One, two or four tiles of 4 x 4 for each thread.
        if 128 * warps <= columns <= 512 * warps
    )
    yield Kernel(
        op="transposable_mask",
        tile="",
        key="all",
        default=find_search_tile(capability),
        candidates=candidates,
        make=make,
        run=run,
    )
