"""The Triton kernels of `block_sparse_matmul`: interpreted, or on a GPU where there is one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sparse_matmul
from pallas_kernels.block_sparse_matmul import triton as package
from pallas_kernels.block_sparse_matmul.triton import products, tiles
from pallas_kernels.doctor.oracles import error, make_normal
from tests.kernels.block_matmul_contract import (
    BlockMatmulCase,
    call_block_matmul,
    check_block_matmul,
)
from tests.kernels.broken_triton import break_kernel
from tests.kernels.triton_interpreter import triton_kernels
from tests.tiers import tier

_SMALL = BlockMatmulCase(
    leading=(2, 19),
    grid=(2, 3),
    block=(32, 16),
    dtype="bfloat16",
    mask_names=("global_row_and_column", "gradient of everything"),
)
_change = functools.partial(dataclasses.replace, _SMALL)
CASES = {
    "small": _SMALL,
    "every_mask_f32": _change(grid=(3, 4), dtype="float32", mask_names=None),
    "whole_tiles_f16": _change(leading=(256,), block=(64, 64), dtype="float16"),
    "odd_multiples": _change(
        leading=(3, 43), block=(48, 96), mask_names=("gradient of everything",)
    ),
    "large_blocks": _change(leading=(65,), block=(128, 256), mask_names=("random",)),
    "one_token": _change(leading=(1,), mask_names=("random",)),
}


@pytest.mark.parametrize("case", tier(CASES, fast=["small"]))
def test_contract(case):
    with triton_kernels():
        check_block_matmul(case, call_block_matmul("triton"))


@pytest.mark.ci
@pytest.mark.parametrize("capability", [(9, 0), (10, 0)])
def test_contract_in_deep_tiles(capability):
    with triton_kernels(capability):
        check_block_matmul(CASES["whole_tiles_f16"], call_block_matmul("triton"))


@pytest.mark.ci
def test_more_row_tiles_than_a_group(monkeypatch):
    monkeypatch.setattr(products, "_GROUP", 2)
    case = _change(leading=(5 * 128 - 3,), mask_names=("global_row_and_column",))
    with triton_kernels():
        check_block_matmul(case, call_block_matmul("triton"))


@pytest.mark.ci
@pytest.mark.parametrize("axes", [(0, 0, 0, None), (0, None, None, 0), (None, 0, 0, 0)])
def test_vmap_folds_the_axis_into_one_launch(axes):
    x, w, bias = make_normal(((2, 20, 32), (2, 32, 48), (2, 48)))
    mask = jnp.asarray(np.random.default_rng(0).random((2, 2, 3)) < 0.5)
    arrays = [a if axis == 0 else a[0] for a, axis in zip((x, w, bias, mask), axes, strict=True)]

    def gradient(implementation):
        def loss(x, w, bias, mask):
            y = block_sparse_matmul(x, w, mask, bias=bias, implementation=implementation)
            return (y**2).sum()

        return jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1, 2)), in_axes=axes))

    with triton_kernels():
        text = gradient("triton").lower(*arrays).as_text()
        got = jax.tree.leaves(gradient("triton")(*arrays))
    if jax.default_backend() == "cpu":
        assert text.count("stablehlo.custom_call @xla_ffi_python_cpu_callback") == 3
    for a, e in zip(got, jax.tree.leaves(gradient("xla")(*arrays)), strict=True):
        assert error(a, e) <= 1e-5 * np.abs(e).max()


@pytest.mark.ci
def test_scan_over_layers():
    x, w = make_normal(((20, 32), (3, 32, 32)))
    masks = jnp.asarray(np.random.default_rng(1).random((3, 2, 2)) < 0.6)

    def loss(w, implementation):
        def layer(x, leaves):
            w, mask = leaves
            return jnp.tanh(block_sparse_matmul(x, w, mask, implementation=implementation)), None

        return (jax.lax.scan(jax.checkpoint(layer), x, (w, masks))[0] ** 2).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    with triton_kernels():
        got = gradient(w, "triton")
    assert error(got, gradient(w, "xla")) < 1e-4


_OFF, _RACE, _BOUNDS = "^{} of mask", "race: program", "outside of every array"
# Name -> what stands there, what is put in its place, who notices.
_BROKEN = {
    "last block of a list dropped": (
        "tl.load(counts + unit) * steps):", "(tl.load(counts + unit) - 1) * steps):",
        _OFF.format("y"),
    ),
    "same step again": (" + following % steps * BK", "", _OFF.format("y")),
    "lists of other columns": (
        "columns = unit % U * OUTER", "columns = (U - 1 - unit % U) * OUTER", _OFF.format("y")
    ),
    "no bias": ("if BIAS:", "if False:", _OFF.format("y")),
    "rows behind the last are written": (", mask=(rows < M - start)[:, None])", ")", _BOUNDS),
    "two programs write one tile": (" + item % parts * BN", "", _RACE),
    "tokens behind the last tile left out": (
        "tokens < M % BK * is_kept", "tokens < 0 * is_kept", _OFF.format("dw")
    ),
    "gradient of blocks that nobody asked for": (
        "is_kept = tl.load(kept + unit)", "is_kept = 1", _OFF.format("dw")
    ),
}  # fmt: skip


@pytest.mark.ci
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU does not check memory")
@pytest.mark.parametrize("name", _BROKEN)
def test_broken_kernels_are_rejected(name, monkeypatch, tmp_path):
    old, new, message = _BROKEN[name]
    break_kernel(monkeypatch, tmp_path, package, "kernels", old, new)
    # Blocks of several steps and several tiles.
    masks = ("random", "gradient of others")
    case = _change(block=(64, 256), mask_names=masks)
    noticed = pytest.raises((AssertionError, jax.errors.JaxRuntimeError), match=message)
    with noticed, triton_kernels():
        check_block_matmul(case, call_block_matmul("triton"))


def test_tiles_are_cut_to_blocks_and_tokens():
    found = tiles.find_tiles((8, 0), 2, tokens=20, block=(96, 64))
    assert [cut[:3] for cut in found] == [(32, 64, 32), (32, 32, 32), (32, 64, 32)]
    whole = tiles.find_tiles((9, 0), 2, tokens=8192, block=(128, 128))
    assert whole.forward == (128, 128, 64, 8, 4)


@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        ((48, 32), (2, 2), r"sides are multiples of 16, got \(24, 16\)"),
        ((2**17, 2**14), (2**10, 2**7), r"in 32 bits, got \(131072, 16384\)"),
    ],
)
def test_what_the_kernels_do_not_do_is_refused_with_the_reason(shape, grid, message):
    structs = [
        jax.ShapeDtypeStruct(s, d)
        for s, d in (((8, shape[0]), "bfloat16"), (shape, "bfloat16"), (grid, bool))
    ]
    matmul = functools.partial(block_sparse_matmul, implementation="triton")
    with triton_kernels(), pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(matmul, *structs)
