"""The portable backends compiled for GPUs without one: what loops, and how memory grows.

A loop over tiles would leave most of a GPU idle. So the program has a loop for each tile and
walk, along the lists, and none of them holds another.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot, block_sparse_attention, block_sparse_matmul
from pallas_kernels.block_lists import MOST_PARALLEL_TILES
from tests.kernels.portable_forms import find_loops
from tests.tiers import tier

# What XLA makes of loops is alike on both.
_TARGETS = tier(
    {target.name: target for target in (aot.H200, aot.TARGETS["a100"])},
    fast=(),
    slow=[aot.TARGETS["a100"].name],
)


def _compile_attention(target, length, *, mask_heads=1, **options):
    x_BTNH = jax.ShapeDtypeStruct((1, length, 4, 64), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((1, mask_heads, length // 64, length // 64), bool)

    def run(q, k, v, d_out, mask):
        attend = functools.partial(
            block_sparse_attention, block_q=64, block_kv=64, implementation="xla", **options
        )
        out, pull_back = jax.vjp(lambda q, k, v: attend(q, k, v, mask), q, k, v)
        return out, pull_back(d_out)

    mesh = aot.make_gpu_mesh(target)
    return aot.compile_for(run, x_BTNH, x_BTNH, x_BTNH, x_BTNH, mask, mesh=mesh)


def _compile_matmul(target, tokens):
    def struct(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def run(x, w, dy, mask):
        multiply = functools.partial(block_sparse_matmul, implementation="xla")
        y, pull_back = jax.vjp(lambda x, w: multiply(x, w, mask), x, w)
        return y, pull_back(dy)

    mesh, mask = aot.make_gpu_mesh(target), jax.ShapeDtypeStruct((16, 32), bool)
    x, w, dy = struct(tokens, 1024), struct(1024, 2048), struct(tokens, 2048)
    return aot.compile_for(run, x, w, dy, mask, mesh=mesh)


def _check_program(report):
    # The output, dK and dV, dQ; or y, dx, dw.
    walks = 3
    assert find_loops(report.hlo) == ["ENTRY"] * walks * MOST_PARALLEL_TILES
    # What is added in an order that may change from run to run.
    scatters = [line for line in report.hlo.splitlines() if " scatter(" in line]
    assert all("unique_indices=true" in line for line in scatters), scatters


def _check_memory(short, long, most_bytes):
    """Check that temporary memory grows with the length, and how much the longer one takes.

    Either alone might miss a square: cuBLAS's workspace, the same at every length, hides growth.
    """
    assert long.temp_bytes <= 2.3 * short.temp_bytes
    assert long.temp_bytes < most_bytes


@pytest.mark.parametrize("target", _TARGETS)
@pytest.mark.parametrize(
    "options",
    [pytest.param({}, marks=pytest.mark.slow), {"causal": True, "mask_heads": 4}],
    ids=str,
)
def test_attention(target, options):
    short, long = (_compile_attention(target, length, **options) for length in (4096, 8192))
    for report in (short, long):
        _check_program(report)
    operand_bytes = 8192 * 4 * 64 * 2
    _check_memory(short, long, 24 * operand_bytes)


@pytest.mark.parametrize("target", _TARGETS)
def test_matmul(target):
    short, long = (_compile_matmul(target, tokens) for tokens in (4096, 8192))
    for report in (short, long):
        _check_program(report)
    result_bytes = 8192 * 2048 * 4
    _check_memory(short, long, 2 * result_bytes)


def test_loops_are_found_where_they_are():
    def nested(x):
        def inner(i, x):
            return jnp.sin(x) * x.sum() + i

        return jax.lax.fori_loop(0, 5, lambda i, x: jax.lax.fori_loop(0, i, inner, x) + 1, x)

    report = aot.compile_for(nested, jax.ShapeDtypeStruct((8,), jnp.float32))
    holders = find_loops(report.hlo)
    assert len(holders) == 2 and holders.count("ENTRY") == 1
