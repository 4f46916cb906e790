"""Hopper kernels give the same bits in whichever order copies land, and products read late."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    block_sparse_attention,
    block_sparse_matmul,
    mean_attention_map,
    nm_matmul,
)
from pallas_kernels.doctor.oracles import make_nm_masks, make_normal
from tests.kernels.interpreter import hopper
from tests.kernels.ptx_tensor_cores import spread
from tests.kernels.sparse_products import expand
from tests.kernels.test_nm_packing import emulate_instruction

_HOPPER = {"implementation": "mosaic_sm90"}


def _sparse_product():
    x, w = make_normal(((128, 320), (320, 128)), "bfloat16")
    mask = jnp.asarray(make_nm_masks((320, 128), (2, 4))["underfull"])
    return functools.partial(nm_matmul, mask=mask, activation="geglu", **_HOPPER), (x, w)


def _attention():
    # One list of five tiles, more than a ring holds, along either axis.
    q, k, v = make_normal(((1, 320, 1, 32),) * 3, "bfloat16")
    mask = jnp.zeros((1, 1, 5, 5), bool).at[:, :, 1].set(True).at[:, :, :, 1].set(True)
    options = dict(block_q=64, block_kv=64, **_HOPPER)
    return functools.partial(block_sparse_attention, mask_or_schedule=mask, **options), (q, k, v)


def _block_product():
    x, w = make_normal(((128, 512), (512, 64)), "bfloat16")
    mask = jnp.asarray(np.random.default_rng(0).random((8, 1)) < 0.9)
    return functools.partial(block_sparse_matmul, mask=mask, **_HOPPER), (x, w)


def _mean_map():
    q, k = make_normal(((2, 128, 3, 32),) * 2, "bfloat16")
    return functools.partial(mean_attention_map, causal=True, **_HOPPER), (q, k)


@pytest.mark.ci
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU has an order of its own")
@pytest.mark.parametrize(
    "make",
    [_sparse_product, _attention]
    + [pytest.param(make, marks=pytest.mark.slow) for make in (_block_product, _mean_map)],
)
def test_copies_may_land_in_any_order(make):
    function, args = make()

    @jax.jit
    def run(*args):
        value, pull_back = jax.vjp(function, *args)
        return value, pull_back(jnp.ones_like(value))

    results = []
    for copies, seed in (("early", 0), ("late", 0), ("random", 0)):
        with hopper(copies, seed):
            results.append(jax.block_until_ready(run(*args)))
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, results[0])


def test_the_sparse_operand_is_that_of_the_instruction():
    rng = np.random.default_rng(0)
    values = rng.integers(1, 99, (64, 64)).astype(np.float32)
    # All legal pairs of positions.
    nibbles = rng.choice([0x4, 0x8, 0xC, 0x9, 0xD, 0xE], (2, 128, 8))
    words = (nibbles << (4 * np.arange(8))).sum(-1).astype(np.uint32)
    dense = expand(values, words)
    for step in range(4):
        expected, _ = emulate_instruction(
            values[:, 16 * step : 16 * step + 16], words[step // 2], step % 2
        )
        np.testing.assert_array_equal(dense[:, 32 * step : 32 * step + 32], expected)
        kept = values[:, 16 * step : 16 * step + 16]
        np.testing.assert_array_equal(spread(kept, words[step // 2], step % 2), expected)
