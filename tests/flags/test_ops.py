"""Ops and masks under JAX's flags: nothing raises, widens, or is NaN."""

import jax
import pytest

from tests.flags.flags import FLAGS, assert_narrow, flags_set
from tests.flags.mask_calls import MASK_CALLS
from tests.flags.op_calls import CALLS, make_call
from tests.kernels.implementations import interpret

pytestmark = pytest.mark.ci

_INTERPRETED = ("triton", "mosaic_sm90")


# Each push has what runs by default; `make test-all` adds the oracles and the dense paths.
@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize(
    ("op", "implementation"),
    [
        pytest.param(*call, marks=() if call[1] == "xla" else pytest.mark.slow)
        for call in CALLS
        if call[1] not in _INTERPRETED
    ],
)
def test_ops(op, implementation, flag):
    call, arrays = make_call(op, implementation)
    with flags_set(flag):
        results = jax.block_until_ready(jax.jit(call)(*arrays))
    assert_narrow(results, f"{op} of {implementation}")


@pytest.mark.parametrize(
    ("op", "implementation"),
    [
        pytest.param(*call, marks=() if call[1] == "triton" else pytest.mark.slow)
        for call in CALLS
        if call[1] in _INTERPRETED
    ],
)
def test_kernels(op, implementation):
    call, arrays = make_call(op, implementation)
    with flags_set("x64", "rank_promotion"), interpret(implementation):
        results = jax.block_until_ready(jax.jit(call)(*arrays))
    assert_narrow(results, f"{op} of {implementation}")


@pytest.mark.parametrize("flag", FLAGS)
def test_masks(flag):
    for name, (function, arrays) in MASK_CALLS.items():
        arrays = jax.device_put(arrays)
        with flags_set(flag):
            results = jax.block_until_ready(jax.jit(function)(*arrays))
        assert_narrow(results, name)
