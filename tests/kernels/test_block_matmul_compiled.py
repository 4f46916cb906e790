"""The kernels of `block_sparse_matmul` compiled for an H200 without one."""

import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot, block_sparse_matmul

# Tokens, weight, blocks: GPT-2's feed-forward layer, and a wide one.
SIZES = {
    "gpt2_64": (16384, (768, 3072), (64, 64), "bfloat16"),
    "wide_128_f16": (8192, (4096, 4096), (128, 128), "float16"),
    "few_tokens": (256, (768, 768), (64, 128), "bfloat16"),
    "tall_blocks": (8192, (1024, 1024), (128, 64), "bfloat16"),
}
SLOW = {"few_tokens", "tall_blocks"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in SIZES]
)
def test_products_use_tensor_cores_and_spill_nothing(name):
    tokens, shape, block, dtype = SIZES[name]

    def train(x, w, bias, dy, mask, grad_mask):
        def multiply(x, w, bias):
            return block_sparse_matmul(
                x, w, mask, grad_mask=grad_mask, bias=bias, implementation="mosaic_sm90"
            )

        y, pull_back = jax.vjp(multiply, x, w, bias)
        return y, *pull_back(dy)

    grid = tuple(size // side for size, side in zip(shape, block, strict=True))
    mask = jax.ShapeDtypeStruct(grid, jnp.bool_)
    arrays = [(tokens, shape[0]), shape, shape[1:], (tokens, shape[1])]
    x, w, bias, dy = (jax.ShapeDtypeStruct(size, dtype) for size in arrays)
    report = aot.compile_for(train, x, w, bias, dy, mask, mask)
    assert len(report.kernels) == 3, "y, dx and dw"
    for kernel in report.kernels:
        assert kernel.spill_bytes == 0 and kernel.stack_bytes == 0, kernel
        assert kernel.shared_memory_bytes <= aot.H200.shared_memory_per_block_bytes, kernel
        assert not kernel.is_serialized, kernel
        assert re.search(r"\bHGMMA", kernel.sass) and "UTMALDG" in kernel.sass
    # Lists of blocks, and nothing as large as an operand.
    assert report.temp_bytes < min(2 * w.size, 4_000_000)
