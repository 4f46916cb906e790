"""What `benchmarks.hopper_cycles` compiles: kernels of JAX with published rates, and ours.

Published, on an H100 SXM with f16:

- `hopper_matmul_mgpu`: 83.6 % of 990 TFLOP/s for 4096 x 4096 times 4096 x 8192, in the message of
  https://github.com/jax-ml/jax/commit/029bfc28d1edc6757ff1b46dfdb9a53e0786febf, and about 43 us for
  1024 x 4096 times 4096 x 4096 in https://docs.jax.dev/en/latest/pallas/gpu/collective_matmul.html,
  which does not say of which kernel; the tiles are those of its example.
- `attention_mgpu`: of it there is only "64%" of 1000 TFLOP/s "in one example", in
  https://github.com/jax-ml/jax/commit/db158e6c7aff1d90fc1985bbad1d410b815343a9. Its descendants in
  https://github.com/openxla/tokamax, with equal tiles and the same order of warpgroups, have times
  by shape in tokamax/data/autotuning/nvidia_h100_80gb_hbm3 (commit 783ea957; median of five). Rates
  are made of them with 4 operations for each logit and element of a head forward, and 10 backward,
  where the two kernels execute 14. JAX's kernels are compiled in the place of tokamax's.

Letters: B T N H as everywhere (`sparsejax.types`).
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.gpu import attention_mgpu, hopper_matmul_mgpu

from benchmarks.cycle_model import Case, Kernel, Plan, count
from benchmarks.loop_turns import MainLoop, read_main_loop
from pallas_kernels import aot, block_sparse_attention, block_sparse_matmul, mean_attention_map
from pallas_kernels.block_sparse_matmul.mosaic_sm90 import products
from pallas_kernels.nm_matmul.mosaic_sm90.cut import Cut, Problem
from pallas_kernels.nm_matmul.mosaic_sm90.kernel import multiply_sparse
from pallas_kernels.nm_matmul.mosaic_sm90.tile_config import default_config
from pallas_kernels.nm_matmul.packing import TILE, Compressed

_HOPPER: Any = {"implementation": "mosaic_sm90"}
# Rows of queries, or of keys, that a program of an attention kernel keeps.
_RESIDENT_ROWS = 128
# Tokens, and features in and out, of layers with block-sparse weights.
_LAYER = 8192, 4096


def _struct(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def list_anchors() -> Iterator[Case]:
    """List kernels of JAX whose rates are published."""
    yield _jax_product(4096, 4096, 8192, split="M", published_tflops=0.836 * 990)
    yield _jax_product(
        1024, 4096, 4096, split="N", published_tflops=2 * 1024 * 4096**2 / 43e-6 / 1e12
    )
    yield _jax_attention(64, heads=32, rows=128, stages=3, published_tflops=511)
    yield _jax_attention(128, heads=16, rows=64, stages=2, published_tflops=638)
    yield _jax_attention(128, heads=16, rows=64, stages=2, length=1024, published_tflops=522)
    yield _jax_attention(256, heads=8, rows=64, keys=64, stages=2, published_tflops=678)
    yield _jax_backward(published_tflops=463)


def _jax_product(
    rows: int, contraction: int, columns: int, *, split: str, published_tflops: float
) -> Case:
    dimension = hopper_matmul_mgpu.MatmulDimension
    config = hopper_matmul_mgpu.TuningConfig(
        tile_m=128,
        tile_n=128,
        tile_k=64,
        max_concurrent_steps=4,
        grid_minor_dim=dimension.N,
        grid_tile_width=8,
        wg_dimension=dimension[split],
    )
    args = (
        _struct(rows, contraction, dtype="float16"),
        _struct(contraction, columns, dtype="float16"),
    )
    plan = Plan(
        tiles=rows * columns // (128 * 256),
        flops=2 * 128 * 256 * contraction,
        copied_bytes=2 * (128 + 256) * contraction,
        stored_bytes=2 * 128 * 256,
        memory_bytes=2 * (rows * contraction + contraction * columns + rows * columns),
    )
    return Case(
        f"JAX matmul, {rows} x {contraction} x {columns}",
        "tiles of 256 x 128",
        lambda a, b: hopper_matmul_mgpu.matmul(a, b, None, config),
        args,
        [Kernel("product", "", plan)],
        published_tflops,
    )


def _jax_attention(
    head_dim: int,
    *,
    heads: int,
    rows: int,
    stages: int,
    published_tflops: float,
    keys: int = 128,
    length: int = 4096,
) -> Case:
    config = attention_mgpu.TuningConfig(block_q=rows, block_kv=keys, max_concurrent_steps=stages)
    x = _struct(16384 // length, length, heads, head_dim, dtype="float16")
    return Case(
        f"JAX attention, H={head_dim}, T={length}",
        "one list a program",
        functools.partial(attention_mgpu.attention, config=config),
        (x, x, x),
        [Kernel("forward", "", _plan_forward(x, kept=length, rows=2 * rows))],
        published_tflops,
    )


def _jax_backward(*, published_tflops: float) -> Case:
    config = attention_mgpu.TuningConfig(
        block_q=64,
        block_kv=128,
        max_concurrent_steps=2,
        compute_wgs_bwd=2,
        block_q_dkv=64,
        block_kv_dkv=64,
        block_q_dq=64,
        block_kv_dq=64,
    )
    x = _struct(4, 4096, 16, 128, dtype="float16")

    def differentiate(q, k, v):
        attend = functools.partial(attention_mgpu.attention, config=config)
        _, pull_back = jax.vjp(attend, q, k, v)
        return pull_back(q)

    kernels = [
        Kernel("dQ", "anonymous", _plan_backward_queries(x, kept=4096)),
        Kernel("dK, dV", "anonymous", _plan_backward_keys(x, kept=4096)),
    ]
    return Case(
        "JAX attention backward, H=128",
        "one list a program",
        differentiate,
        (x, x, x),
        kernels,
        published_tflops,
        published_flops=10 * 4 * 16 * 4096**2 * 128,
    )


def _plan_forward(
    x: jax.ShapeDtypeStruct, *, kept: int, rows: int, start_reads: int = 2, lists: int = 1
) -> Plan:
    """Plan attention of queries, keys and values like x, with `kept` keys for each query.

    A program waits for the descriptor of its copies and for the first tile.
    """
    B, T, N, H = x.shape
    return Plan(
        tiles=B * N * T // rows,
        flops=4 * rows * kept * H,
        copied_bytes=4 * lists * kept * H,
        stored_bytes=2 * rows * H,
        memory_bytes=8 * B * T * N * H,
        start_reads=start_reads,
    )


def _plan_backward_queries(
    x: jax.ShapeDtypeStruct, *, kept: int, start_reads: int = 2, lists: int = 1
) -> Plan:
    forward = _plan_forward(x, kept=kept, rows=_RESIDENT_ROWS, start_reads=start_reads, lists=lists)
    return forward._replace(flops=1.5 * forward.flops, memory_bytes=10 * x.size)


def _plan_backward_keys(
    x: jax.ShapeDtypeStruct, *, kept: int, start_reads: int = 2, lists: int = 1
) -> Plan:
    forward = _plan_forward(x, kept=kept, rows=_RESIDENT_ROWS, start_reads=start_reads, lists=lists)
    return forward._replace(
        flops=2 * forward.flops,
        # lse and delta in f32.
        copied_bytes=forward.copied_bytes + 8 * lists * kept,
        stored_bytes=2 * forward.stored_bytes,
        memory_bytes=12 * x.size,
    )


def list_cases() -> Iterator[Case]:
    """List our kernels."""
    for head_dim, block in ((128, 128), (128, 64), (64, 128), (64, 64)):
        yield _attention(head_dim, block)
    yield _attention_backward(128, 128)
    yield _attention_backward(64, 64)
    for head_dim in (64, 128, 256):
        yield _mean_map(head_dim)
    yield _sparse_product(4096)
    yield _sparse_product(8192)
    for block in (128, 64):
        yield _block_product(density=0.1, block=block)
    yield _block_product(density=0.1, transposed=True)
    for block in (128, 64):
        yield _block_gradient(density=0.1, block=block)
        yield _block_gradient(density=1, block=block)


def _attention(head_dim: int, block: int) -> Case:
    function, args = _make_attention(head_dim, block)
    plan = _plan_forward(args[0], **_plan_lists(block), rows=_RESIDENT_ROWS)
    return Case(
        f"attention, H={head_dim}, blocks of {block}",
        "one list a program" if block == 128 else "a list for each warpgroup",
        function,
        args,
        [Kernel("forward", "block_sparse_attention_forward", plan)],
    )


def _attention_backward(head_dim: int, block: int) -> Case:
    function, args = _make_attention(head_dim, block)

    def differentiate(*args):
        _, pull_back = jax.vjp(lambda q, k, v: function(q, k, v, args[3]), *args[:3])
        return pull_back(args[0])

    lists, prefix = _plan_lists(block), "block_sparse_attention_backward_"
    return Case(
        f"attention backward, H={head_dim}, blocks of {block}",
        "one list a program" if block == 128 else "a list for each warpgroup",
        differentiate,
        args,
        [
            Kernel("dQ", prefix + "queries", _plan_backward_queries(args[0], **lists)),
            Kernel("dK, dV", prefix + "keys", _plan_backward_keys(args[0], **lists)),
        ],
    )


def _make_attention(head_dim: int, block: int) -> tuple[Callable[..., Any], tuple]:
    """Return attention and its arguments: 4 examples of 4096 positions, 2048 features."""
    x = _struct(4, 4096, 2048 // head_dim, head_dim)
    mask = _struct(1, 1, 4096 // block, 4096 // block, dtype="bool")
    attend = functools.partial(block_sparse_attention, block_q=block, block_kv=block, **_HOPPER)
    return attend, (x, x, x, mask)


def _plan_lists(block: int) -> dict[str, int]:
    """Plan a quarter of all blocks, evenly; a block of 64 rows has a list of its own.

    One read finds a list and its first entry, the next is that of its first tile.
    """
    return {"kept": 1024, "lists": _RESIDENT_ROWS // block, "start_reads": 2}


def _mean_map(head_dim: int) -> Case:
    B, T, N, H = shape = 4, 2048, 1024 // head_dim, head_dim
    tile = 128
    is_whole = head_dim <= 128
    query_bytes = (2 * tile * H + 4 * tile * (1 if is_whole else 2)) * B * N
    key_bytes = 2 * tile * H * B * N
    plan = Plan(
        tiles=(T // tile) ** 2,
        flops=2 * tile * tile * H * B * N,
        copied_bytes=query_bytes + key_bytes,
        stored_bytes=4 * tile * tile,
        memory_bytes=4 * B * T * N * H + 4 * T * T,
        l2_bytes=query_bytes + key_bytes / 2,
    )
    mean_map = functools.partial(mean_attention_map, **_HOPPER)
    return Case(
        f"mean map, H={H}",
        f"a step is {'a' if is_whole else 'half a'} head, clusters of 2",
        lambda q, k, lse: mean_map(q, k, lse=lse),
        (_struct(*shape), _struct(*shape), _struct(B, T, N, dtype="float32")),
        [Kernel("map", "mean_attention_map", plan)],
    )


def _sparse_product(size: int) -> Case:
    processors = aot.H200.cores
    tiles = default_config(size, size, size, "bfloat16", num_programs=processors)
    # A multiple of the tile: of what is filled up, the rate would count zeros.
    columns = -(-size // tiles.columns) * tiles.columns
    problem = Problem(
        rows=size, contraction=size, columns=columns, dtype="bfloat16", dense_is_transposed=True
    )
    num_tiles = Cut(problem, tiles).num_tiles
    # Half of the values, and two bits of metadata for each that is left.
    value_bytes, dense_bytes = tiles.rows * (1 + 1 / 8) * size, 2 * tiles.columns * size
    plan = Plan(
        tiles=num_tiles,
        flops=2 * tiles.rows * tiles.columns * size,
        copied_bytes=value_bytes + dense_bytes,
        stored_bytes=2 * tiles.rows * tiles.columns,
        memory_bytes=(1 + 1 / 8 + 2 + 2) * size**2,
        l2_bytes=value_bytes + dense_bytes / tiles.cluster,
    )
    values, metadata = (
        _struct(size, size // 2),
        _struct(size // TILE, size // TILE, 2 * TILE, dtype="uint32"),
    )
    compressed: Any = Compressed(values, metadata)  # type: ignore[arg-type]
    multiply = functools.partial(
        multiply_sparse, problem=problem, tiles=tiles, num_programs=processors
    )
    return Case(
        f"2:4 product, {size} x {size} x {columns}",
        f"tiles of {tiles.rows} x {tiles.columns}, clusters of {tiles.cluster}",
        multiply,
        (compressed, _struct(columns, size), None),
        [Kernel("product", "nm_matmul", plan)],
    )


def _block_product(*, density: float, block: int = 128, transposed: bool = False) -> Case:
    """Plan y, or dx, of a layer with as many inputs as outputs."""
    tokens, size = _LAYER
    grid = (size // block,) * 2
    row_plan = products.make_row_plan(
        tokens, (size, size), grid, transposed=transposed, num_programs=aot.H200.cores
    )
    rows, columns, cluster = 2 * row_plan.shape[0], row_plan.shape[1], row_plan.cluster
    kept = density * size
    plan = Plan(
        tiles=tokens * size // (rows * columns),
        flops=2 * rows * columns * kept,
        copied_bytes=2 * (rows + columns) * kept,
        stored_bytes=2 * rows * columns,
        memory_bytes=2 * (2 * tokens * size + density * size**2),
        l2_bytes=2 * (rows + columns / cluster) * kept,
    )
    matmul: Any = functools.partial(block_sparse_matmul, **_HOPPER)
    return Case(
        f"block-sparse {'dx' if transposed else 'product'}, {density:.0%} of blocks of {block}",
        f"tiles of {rows} x {columns}, clusters of {cluster}",
        products.multiply_transposed if transposed else matmul,
        (_struct(tokens, size), _struct(size, size), _struct(*grid, dtype="bool")),
        [Kernel(row_plan.name, f"block_sparse_matmul_{row_plan.name}", plan)],
    )


def _block_gradient(*, density: float, block: int) -> Case:
    """Plan dw of a layer with as many inputs as outputs."""
    tokens, size = _LAYER
    grid = (size // block,) * 2
    mask = np.random.default_rng(0).permuted(np.arange(grid[0] * grid[1])).reshape(grid)
    mask = mask < round(density * mask.size)
    lists = products.pair_blocks(jnp.asarray(mask), tokens, num_programs=aot.H200.cores)
    assert lists.others is not None
    tiles, is_paired = int((lists.counts > 0).sum()), bool((lists.others >= 0).any())
    # Where some tiles have two blocks and some have one, the mean.
    columns = block * mask.sum() / tiles
    plan = Plan(
        tiles=tiles,
        flops=2 * block * columns * tokens,
        copied_bytes=2 * (block + columns) * tokens,
        stored_bytes=2 * block * columns,
        memory_bytes=2 * (2 * tokens * size + size**2),
    )
    return Case(
        f"block-sparse dw, {density:.0%} of blocks of {block}",
        "tiles of two blocks" if is_paired else "tiles of one block",
        products.multiply_gradient,
        (_struct(tokens, size), _struct(tokens, size), _struct(*grid, dtype="bool")),
        [Kernel("gradient", "block_sparse_matmul_gradient", plan, loop=0 if is_paired else 1)],
    )


def read_loops(case: Case, target: aot.GpuTarget) -> list[MainLoop]:
    """Compile a case for a GPU and read the main loop of each of its kernels."""
    report = aot.compile_for(case.function, *case.args, mesh=aot.make_gpu_mesh(target))
    waiting = {
        (prefix, loop): sorted(
            (read_main_loop(x.sass, loop) for x in report.kernels if x.name.startswith(prefix)),
            key=lambda loop: count(loop.turn).flops,
        )
        for prefix, loop in {(kernel.prefix, kernel.loop) for kernel in case.kernels}
    }
    return [waiting[kernel.prefix, kernel.loop].pop(0) for kernel in case.kernels]
