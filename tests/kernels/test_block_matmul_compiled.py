"""The kernels of `block_sparse_matmul` compiled for an H200 without one."""

import collections
import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot, block_sparse_matmul
from pallas_kernels.block_sparse_matmul.mosaic_sm90 import kernel as kernel_module
from tests.kernels.machine_checks import check_kernel

_matmul = functools.partial(block_sparse_matmul, implementation="mosaic_sm90")


def _struct(*shape: int, dtype: Any = "bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


def _compile(tokens, shape, blocks, dtype="bfloat16", *, has_bias=True):
    grid = tuple(size // side for size, side in zip(shape, blocks, strict=True))
    mask = _struct(*grid, dtype=bool)
    bias = _struct(shape[1], dtype=dtype) if has_bias else None

    def run(x, w, mask, grad_mask, bias, dy):
        y, pull_back = jax.vjp(
            lambda x, w, bias: _matmul(x, w, mask, grad_mask=grad_mask, bias=bias), x, w, bias
        )
        return y, pull_back(dy)

    return aot.compile_for(
        run, _struct(tokens, shape[0], dtype=dtype), _struct(*shape, dtype=dtype), mask, mask, bias,
        _struct(tokens, shape[1], dtype=dtype),
    )  # fmt: skip


def _check(kernel):
    # Those of the step that was started last, of which a tile with two blocks has two.
    check_kernel(kernel, in_flight_at_release=2 if "gradient" in kernel.name else 1)
    assert "wgmma.mma_async" in kernel.ptx
    # Operands and results are copied by the hardware.
    assert "UTMALDG" in kernel.sass and "UTMASTG" in kernel.sass, kernel


# Of one loop, and of one for two blocks beside it.
_WAITS = ["0x1", "0x0"], ["0x2", "0x0", "0x0", "0x1", "0x0"]


def _check_products(report, blocks, dtype, rows, *, is_shared=True):
    """Check the three kernels; `rows` are those of a warpgroup in y and dx.

    Where `is_shared`, programs of a cluster share the weight.
    """
    kernels = {kernel.name.split("_")[-2]: kernel for kernel in report.kernels}
    assert sorted(kernels) == ["forward", "gradient", "transposed"] and len(report.kernels) == 3
    for name, columns, height in (
        ("forward", blocks[1], rows[0]),
        ("transposed", blocks[0], rows[1]),
        ("gradient", blocks[1], 64),
    ):
        kernel = kernels[name]
        _check(kernel)
        assert ("MULTICAST" in kernel.sass) == (is_shared and name != "gradient"), name
        # A step takes 64 positions of the contraction, 16 an instruction. The gradient has a loop
        # of two blocks, where shared memory holds them, and one of one.
        has_pairs = name == "gradient" and blocks != (64, 128)
        suffix = ".BF16" if dtype == "bfloat16" else ""
        found = collections.Counter(re.findall(r"\bHGMMA\S*", kernel.sass))
        assert found == {
            f"HGMMA.64x{columns}x16.F32{suffix}": (3 if has_pairs else 1) * 4 * height // 64
        }, (name, found)
        # A group of instructions for each block stays in flight over a step; all are awaited after
        # the last.
        waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (\S+)", kernel.sass)
        assert waits == _WAITS[has_pairs], (name, waits)
    assert report.temp_bytes < 1e5, "an operand is copied"


@pytest.mark.ci
def test_layers_of_gpt2():
    # Eight tall tiles times 48 columns of blocks are enough for 132 processors, times 12 are not.
    report = _compile(2048, (768, 3072), (64, 64))
    _check_products(report, (64, 64), "bfloat16", (128, 64))


@pytest.mark.ci
def test_the_layer_of_the_target():
    report = _compile(8192, (4096, 4096), (128, 128), has_bias=False)
    _check_products(report, (128, 128), "bfloat16", (128, 128))


_SETTINGS = list(itertools.product(((64, 64), (64, 128), (128, 64), (128, 128)), (384, 16384)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("blocks", "tokens"), _SETTINGS, ids=str)
def test_every_block(blocks, tokens, dtype):
    rows = 64 if tokens == 384 else 128
    report = _compile(tokens, (2048, 1024), blocks, dtype)
    # Of 384 tokens, three row tiles of 128.
    _check_products(report, blocks, dtype, (rows, rows), is_shared=tokens != 384)


@pytest.mark.slow
def test_a_missing_wait_is_noticed(monkeypatch):
    # Without the wait, what follows may overwrite operands that are still read.
    monkeypatch.setattr(kernel_module.plgpu, "wgmma_wait", lambda n: None)
    with pytest.raises(AssertionError):
        _check_products(_compile(2048, (768, 3072), (64, 64)), (64, 64), "bfloat16", (128, 64))


@pytest.mark.ci
def test_scanned_layers_that_are_computed_again():
    x, w, mask = _struct(1000, 512), _struct(3, 512, 512), _struct(3, 8, 4, dtype=bool)

    def loss(w, x, mask, is_update):
        def body(x, layer):
            w, mask = layer
            return jnp.tanh(_matmul(x, w, mask, grad_mask=mask | is_update)), None

        return jax.lax.scan(jax.checkpoint(body), x, (w, mask))[0].astype(jnp.float32).sum()

    report = aot.compile_for(jax.grad(loss), w, x, mask, _struct(dtype=bool))
    for kernel in report.kernels:
        _check(kernel)
    names = collections.Counter(kernel.name.split("_")[-2] for kernel in report.kernels)
    assert set(names) == {"forward", "gradient", "transposed"}, names


def test_an_unproven_kernel_is_not_chosen():
    mesh = aot.make_gpu_mesh()
    x, w, mask = _struct(256, 128), _struct(128, 128), _struct(1, 1, dtype=bool)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        chosen, named = (
            str(jax.make_jaxpr(matmul)(x, w, mask)) for matmul in (block_sparse_matmul, _matmul)
        )
    assert "block_sparse_matmul_forward" in named and "block_sparse_matmul_" not in chosen
