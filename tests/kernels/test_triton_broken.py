"""The interpreter of the tests notices Triton kernels that are broken on purpose."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.block_sparse_attention import triton as package
from tests.kernels.broken_triton import break_kernel
from tests.kernels.contract import Case, call_implementation, check_case
from tests.kernels.triton_interpreter import run, tl, triton_kernels

triton = pytest.importorskip("triton")

_CASE = Case(
    batch=1, num_heads=4, num_kv_heads=2, num_queries=128, num_keys=128, head_dim=16, block_q=128,
    block_kv=32, causal=True, mask_names=("random",),
)  # fmt: skip
_OFF, _RACE, _BOUNDS = "{} off by", "race: program", "outside of every array"

# Name -> file, what stands there, what is put in its place, who notices.
_BROKEN = {
    "last entry dropped": (
        "forward_kernel", "count * steps):", "count * steps - 1):", _OFF.format("out")
    ),
    "no mask on the diagonal": (
        "forward_kernel", "num_clear = tl.load(leading + unit)", "num_clear = count",
        _OFF.format("out"),
    ),
    "wrong key head": (
        "forward_kernel", "k_base = k + b * S * K * H + (n // (N // K)) * H",
        "k_base = k + b * S * K * H + (n % K) * H", _OFF.format("out"),
    ),
    "out of bounds": ("forward_kernel", "tl.store(lse + at,", "tl.store(lse + at + 1,", _BOUNDS),
    "two programs write one tile": (
        "forward_kernel", "rows = i * PQ + part * BQ", "rows = i * PQ", _RACE
    ),
    "an output is not written": (
        "forward_kernel", "_rows(out + b * T * N * H + n * H", "_rows(out + b * T * N * H",
        r"race|no program writes",
    ),
    "dq without delta": (
        "backward_kernels", "(dp - row_delta[:, None])", "dp", _OFF.format("dq")
    ),
    "dk and dv of one query head": (
        "backward_kernels", "n = head * group + member", "n = head * group", _OFF.format("dk")
    ),
    "no mask on the diagonal of keys": (
        "backward_kernels", "num_masked * steps):", "0):", _OFF.format("dk")
    ),
}  # fmt: skip


@pytest.mark.ci
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU does not check memory")
@pytest.mark.parametrize("name", _BROKEN)
def test_broken_kernels_are_rejected(name, monkeypatch, tmp_path):
    module_name, old, new, message = _BROKEN[name]
    break_kernel(monkeypatch, tmp_path, package, module_name, old, new)
    noticed = pytest.raises((AssertionError, jax.errors.JaxRuntimeError), match=message)
    with noticed, triton_kernels():
        check_case(_CASE, call_implementation("triton"))


@triton.jit
def _multiply(x, y, out, N: tl.constexpr):
    at = tl.arange(0, N)
    square = at[:, None] * N + at[None, :]
    product = tl.dot(tl.load(x + square), tl.load(y + square))
    tl.store(out + square, product.to(out.dtype.element_ty))


@triton.jit
def _read_of_another(x, out):
    me = tl.program_id(0)
    tl.store(out + me, tl.load(x + me))
    tl.store(out + me, tl.load(out + me * 0))


@triton.jit
def _write_input(x, out):
    tl.store(out, tl.load(x))
    tl.store(x, 1.0)


def test_bfloat16_is_multiplied_and_rounded_to_nearest():
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((16, 16)).astype(ml_dtypes.bfloat16) for _ in range(2))
    struct = jax.ShapeDtypeStruct((16, 16), jnp.bfloat16)
    (got,) = run(_multiply, 1, {"x": x, "y": y}, {"out": struct}, {"N": 16})
    exact = x.astype(np.float32) @ y.astype(np.float32)
    np.testing.assert_array_equal(got, exact.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize(
    ("kernel", "message"),
    [(_read_of_another, "reads out of another"), (_write_input, "writes the input x")],
)
def test_what_programs_do_to_each_other_is_seen(kernel, message):
    x, struct = np.zeros(2, np.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
    with pytest.raises(Exception, match=message):
        run(kernel, 2, {"x": x}, {"out": struct}, {})


def test_triton_is_as_it_was_after_a_kernel_was_interpreted():
    before = tl.load, tl.core.reduce, tl.tensor.__add__
    test_bfloat16_is_multiplied_and_rounded_to_nearest()
    with pytest.raises(Exception, match="writes the input"):
        run(
            _write_input,
            1,
            {"x": np.zeros(1, np.float32)},
            {"out": jax.ShapeDtypeStruct((1,), jnp.float32)},
            {},
        )
    assert (tl.load, tl.core.reduce, tl.tensor.__add__) == before
