"""The product with a block-sparse weight: one contract for all, and broken ones it must reject."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sparse_matmul
from pallas_kernels.block_sparse_matmul.xla import products, serial
from pallas_kernels.doctor.oracles import make_masks, make_normal
from tests.kernels.block_matmul_contract import (
    BlockMatmulCase,
    call_block_matmul,
    check_block_matmul,
)
from tests.tiers import tier

PLAIN = BlockMatmulCase()
CASES = {
    "plain": PLAIN,
    "one axis": BlockMatmulCase(leading=(24,), block=(1, 3)),
    "one block": BlockMatmulCase(grid=(1, 1), block=(8, 8)),
    "bfloat16": BlockMatmulCase(dtype="bfloat16", block=(16, 8)),
    "float16": BlockMatmulCase(dtype="float16", grid=(5, 3)),
}


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("case", tier(CASES, fast=["bfloat16"]))
def test_contract(case, implementation):
    if case.grid == (1, 1):
        # make_masks wants three columns; a grid of one has two masks.
        case = _OneBlock(**{**case.__dict__})
    check_block_matmul(case, call_block_matmul(implementation))


# What decides between the forms for a CPU: the density at which they break even, and how long a
# list must be for a loop of its own.
_CPU_FORMS = {"blocks": (2.0, 1000), "lists": (2.0, 0), "masked": (0.0, 0)}


@pytest.mark.parametrize("form", tier(_CPU_FORMS, fast=["lists"]))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_form_for_a_cpu_keeps_the_contract(monkeypatch, dtype, form):
    break_even, long_list = form
    monkeypatch.setattr(products, "find_break_even", lambda _: break_even)
    monkeypatch.setattr(serial, "_LONG_LIST", long_list)
    # JAX keeps what it traced of the branches of a condition.
    jax.clear_caches()
    # Full lists of 9 and of 17 are taken 8 and 16 at a time, and 1 is left over.
    case = BlockMatmulCase(grid=(9, 17), block=(8, 4), dtype=dtype)
    check_block_matmul(case, call_block_matmul("xla"))
    jax.clear_caches()


class _OneBlock(BlockMatmulCase):
    def masks(self):
        full, none = jnp.ones((1, 1), bool), jnp.zeros((1, 1), bool)
        return {"full": (full, full), "none": (none, none), "gradient": (none, full)}


def _masks_swapped(x, w, mask, grad_mask, bias):
    return block_sparse_matmul(x, w, mask, grad_mask=mask, bias=bias)


def _dense_gradient(x, w, mask, grad_mask, bias):
    full = jnp.ones_like(grad_mask)
    return block_sparse_matmul(x, w, mask, grad_mask=full, bias=bias)


def _multiplied_mask(x, w, mask, grad_mask, bias):
    rows, columns = w.shape[0] // mask.shape[0], w.shape[1] // mask.shape[1]
    kept = w * mask.repeat(rows, 0).repeat(columns, 1)  # NaN * 0 is NaN
    return block_sparse_matmul(x, kept, jnp.ones_like(mask), grad_mask=grad_mask, bias=bias)


def _one_block_forgotten(x, w, mask, grad_mask, bias):
    first = jnp.argmax(mask.ravel())
    mask = mask.ravel().at[first].set(False).reshape(mask.shape)
    return block_sparse_matmul(x, w, mask, grad_mask=grad_mask, bias=bias)


def _rounded_twice(x, w, mask, grad_mask, bias):
    y = 0
    for i in range(mask.shape[0]):
        row = jnp.zeros_like(mask).at[i].set(mask[i])
        y = (y + block_sparse_matmul(x, w, row, grad_mask=grad_mask & row)).astype(jnp.bfloat16)
    return y.astype(x.dtype) + bias


def _no_bias(x, w, mask, grad_mask, bias):
    return block_sparse_matmul(x, w, mask, grad_mask=grad_mask) + 0 * bias


_BROKEN = (
    _masks_swapped,
    _dense_gradient,
    _multiplied_mask,
    _one_block_forgotten,
    _rounded_twice,
    _no_bias,
)


@pytest.mark.parametrize("broken", tier({f.__name__: f for f in _BROKEN}, fast=["_masks_swapped"]))
def test_the_contract_rejects_broken_implementations(broken):
    with pytest.raises(AssertionError):
        check_block_matmul(PLAIN, broken)


@pytest.mark.ci
def test_layers_that_are_scanned_and_recomputed_keep_their_masks():
    x, w, dy = make_normal(((12, 16), (3, 16, 16), (12, 16)))
    masks = make_masks((4, 4))
    mask = jnp.stack([masks[name] for name in ("random", "one_block", "full")])

    def deep(implementation, x, w):
        matmul = functools.partial(block_sparse_matmul, implementation=implementation)
        body = jax.checkpoint(lambda x, layer: (jnp.tanh(matmul(x, *layer)), None))
        return jax.lax.scan(body, x, (w, mask))[0]

    results = []
    for implementation in ("xla", "reference"):
        y, pull_back = jax.vjp(functools.partial(deep, implementation), x, w)
        results.append((y, *pull_back(dy)))
    for got, expected in zip(*results, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_work_follows_the_mask():
    x, w = jnp.ones((64, 128)), jnp.ones((128, 256))
    mask = jnp.ones((8, 16), bool)
    # A trip count that is data: XLA counts the body of the loop once.
    cost = jax.jit(serial.multiply).lower(x, w, mask, None).compile().cost_analysis()
    assert cost["flops"] < 2 * x.size * w.shape[1] / 16


@pytest.mark.parametrize("is_gradient", [False, True])
def test_the_form_follows_the_density(is_gradient):
    multiply = products.choose_by_mask(
        lambda *_: jnp.array(False), lambda *_: jnp.array(True), is_gradient=is_gradient
    )
    left, right = jnp.ones((128, 128)), jnp.ones((128, 256))
    # Blocks of 64 break even where 0.32 are kept: 2.56 of 8.
    masks = jnp.arange(8).reshape(1, 2, 4) < jnp.array([2, 3, 8]).reshape(3, 1, 1)
    assert [bool(multiply(left, right, mask)) for mask in masks] == [False, True, True]
    # One form for all: their average decides, and is above that with the last mask alone.
    batched = jax.jit(jax.vmap(multiply, in_axes=(None, None, 0), out_axes=None))
    assert bool(batched(left, right, masks)) and not bool(batched(left, right, masks[:2]))


def test_blocks_break_even_at_a_third_at_most():
    sides = ((16, 16), (32, 32), (64, 64), (32, 128), (256, 256))
    expected = (0.08, 0.16, 0.32, 0.32, 1 / 3)
    assert [products.find_break_even(block) for block in sides] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.ones((3, 5))}, r"x must be \[..., K\] and w \[K, N\], got x.shape=\(3, 5\)"),
        ({"x": jnp.ones((0, 4))}, "must not be empty"),
        ({"x": jnp.ones((3, 4), jnp.int32)}, "must share one of float32, bfloat16, float16"),
        ({"mask": jnp.ones((2, 3))}, r"mask must be bool\[I, J\], got float32\[2, 3\]"),
        ({"mask": jnp.ones((3, 3), bool)}, r"I a divisor of K and J of N, got \[3, 3\] for a wei"),
        ({"mask": jnp.ones((2, 3, 1), bool)}, r"mask must be bool\[I, J\], got bool\[2, 3, 1\]"),
        ({"grad_mask": jnp.ones((4, 6), bool)}, r"grad_mask must be bool\[2, 3\], got"),
        ({"bias": jnp.ones(4)}, r"bias must be float32\[6\] or None, got float32\[4\]"),
        ({"implementation": "dense"}, "implementation must be None or one of .* got 'dense'"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    arguments = {"x": jnp.ones((3, 4)), "w": jnp.ones((4, 6)), "mask": jnp.ones((2, 3), bool)}
    with pytest.raises(ValueError, match=message):
        block_sparse_matmul(**arguments | changes)
