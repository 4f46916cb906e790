"""The Hopper kernels of `block_sparse_matmul` against the contract: interpreted, or on a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import block_sparse_matmul
from tests.kernels.block_matmul_contract import (
    BlockMatmulCase,
    call_block_matmul,
    check_block_matmul,
)
from tests.kernels.interpreter import hopper

_SMALL = BlockMatmulCase(leading=(70,), grid=(2, 3), block=(64, 64), dtype="bfloat16")


class _FewMasks(BlockMatmulCase):
    """The masks that differ most, each of which takes seconds to interpret."""

    def masks(self):
        masks = super().masks()
        names = ("gradient of others", "one_block", "gradient of everything")
        return {name: masks[name] for name in names}


CASES = {
    "squares of 64": dataclasses.replace(_SMALL),
    "wide": dataclasses.replace(_SMALL, block=(64, 128), dtype="float16"),
    "tall": dataclasses.replace(_SMALL, block=(128, 64), leading=(2, 64)),
    # More steps than the ring holds: slots are used again.
    "long lists": dataclasses.replace(_SMALL, grid=(6, 3), leading=(384,)),
}
_SLOW = {"wide", "long lists"}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            _FewMasks(**dataclasses.asdict(case)),
            id=name,
            marks=pytest.mark.slow if name in _SLOW else (),
        )
        for name, case in CASES.items()
    ],
)
def test_contract(case):
    with hopper():
        check_block_matmul(case, call_block_matmul("mosaic_sm90"))


@pytest.mark.parametrize(
    ("inner", "columns", "grid", "dtype", "message"),
    [
        (64, 64, (2, 1), "bfloat16", r"blocks with sides of \(64, 128\), got \(32, 64\)"),
        (64, 64, (1, 1), "float32", "takes bfloat16 and float16, got float32"),
    ],
)
def test_what_the_kernel_does_not_do_is_refused(inner, columns, grid, dtype, message):
    x, w = jnp.ones((8, inner), dtype), jnp.ones((inner, columns), dtype)
    with hopper(), pytest.raises(NotImplementedError, match=message):
        block_sparse_matmul(x, w, jnp.ones(grid, bool), implementation="mosaic_sm90")


def test_without_a_hopper_gpu_it_is_refused():
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    x = jnp.ones((8, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="needs a Hopper GPU"):
        block_sparse_matmul(
            x, x[:1].repeat(64, 0), jnp.ones((1, 1), bool), implementation="mosaic_sm90"
        )
