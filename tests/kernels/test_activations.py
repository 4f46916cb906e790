"""Activations and their slopes against float64, as XLA computes them and as a GPU rounds them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal

from pallas_kernels.nm_matmul.activations import gelu_with_slope, silu_with_slope
from tests.kernels.float64 import act_parts

ACTIVATIONS = {"gelu": gelu_with_slope, "silu": silu_with_slope}
_ULP = 2.0**-24  # half a unit in the last place, relative: one rounding
# An exponential or a quotient that leaves the normal numbers is 0; times the slope's factors,
# which stay below 1e3 where that happens.
_FLUSHED = 1e-35


def _grid():
    sizes = np.geomspace(1e-30, 1e4, 3000)
    few = [0.0, -0.0, -3, -5, -8, -12, -20, -87, -88, -89, -103, -105, 1e13, -1e13, 1e20, -1e20]
    extremes = [3e38, -3e38, 3.4028235e38, -3.4028235e38, 1.2e-38, -1.2e-38]
    z = np.concatenate([sizes, -sizes, np.linspace(-25, 25, 4001), few, extremes])
    return z.astype(np.float32)


def _check(got, expected, size, bound):
    got = np.asarray(got, np.float64)
    assert np.isfinite(got).all()
    excess = np.abs(got - expected) - bound * size
    worst = excess.argmax()
    assert excess[worst] <= _FLUSHED, (got[worst], expected[worst], bound[worst])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_value_and_slope_keep_their_digits(name):
    z = _grid()
    value, slope = jax.jit(ACTIVATIONS[name])(z)
    exact = act_parts(z, name)
    # Five roundings make the exponent t, whose relative error times |t| is that of exp(t). The
    # rest is exp itself and four operations.
    bound = (8 + 5 * np.abs(exact.exponent)) * _ULP
    _check(value, exact.value, np.abs(exact.value), bound)
    # Where the two terms of the slope cancel, near z = -1, digits are those of its terms.
    _check(slope, exact.slope, exact.slope_size, bound)
    assert np.array_equal(np.signbit(value), np.signbit(z))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_infinite_inputs(name):
    value, slope = jax.jit(ACTIVATIONS[name])(jnp.array([-jnp.inf, jnp.inf, jnp.nan]))
    theirs = {"gelu": jax.nn.gelu, "silu": jax.nn.silu}[name](jnp.array([-jnp.inf, jnp.inf]))
    np.testing.assert_array_equal(value[:2], theirs)
    np.testing.assert_array_equal(slope[:2], [0.0, 1.0])
    assert jnp.isnan(value[2]) and jnp.isnan(slope[2])


def _evaluate(jaxpr, consts, args, replaced):
    """Run a jaxpr with other implementations of some primitives."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    for equation in jaxpr.eqns:
        inputs = [x.val if isinstance(x, Literal) else known[x] for x in equation.invars]
        primitive, inner = equation.primitive, equation.params.get("jaxpr")
        if primitive.name in replaced:
            results = replaced[primitive.name](*inputs)
        elif inner is not None:
            results = _evaluate(inner.jaxpr, inner.consts, inputs, replaced)
        else:
            results = primitive.bind(*inputs, **equation.params)
        results = results if isinstance(results, list | tuple) else [results]
        known |= zip(equation.outvars, results, strict=True)
    return [known[x] for x in jaxpr.outvars]


def _on_gpu(function, z, exp_sign, div_sign):
    """Evaluate as a kernel with approximate math does, errors at their documented limits.

    exp(x) is ex2.approx.ftz of the rounded product with log2 e, within 2^-22; division is
    div.full, within two units in the last place; tanh is tanh.approx, within 2^-11. All relative.
    """

    def exp(x):
        with np.errstate(over="ignore"):
            power = np.float32(x) * np.float32(math.log2(math.e))
            result = np.float32(np.exp2(np.float64(power)) * (1 + exp_sign * 2.0**-22))
        return jnp.asarray(np.where(result < np.finfo(np.float32).tiny, 0, result), jnp.float32)

    def div(x, y):
        quotient = np.float64(x) / np.float64(y)
        return jnp.asarray(quotient * (1 + div_sign * 2.0**-22), jnp.float32)

    def tanh(x, **_):
        return jnp.asarray(np.tanh(np.float64(x)) * (1 + exp_sign * 2.0**-11), jnp.float32)

    replaced = {"exp": lambda x, **_: exp(x), "div": div, "tanh": tanh}
    closed = jax.make_jaxpr(function)(z)
    return [
        np.asarray(x, np.float64) for x in _evaluate(closed.jaxpr, closed.consts, [z], replaced)
    ]


def _gelu_by_tanh(z):
    return 0.5 * z * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def _silu_by_tanh(z):
    return 0.5 * z * (1 + jnp.tanh(0.5 * z))


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_approximate_instructions_keep_the_digits(name, signs):
    z = _grid()
    z = z[np.abs(z) < 3.1e38]  # the model's error would make infinity of what is larger
    value, slope = _on_gpu(ACTIVATIONS[name], z, *signs)
    exact = act_parts(z, name)
    # As in XLA, and one rounding more in the exponent. What errs by 2^-22, eight roundings' worth
    # with its own last one, is exp and the quotient, and each counts twice in the slope.
    bound = (8 + 6 * np.abs(exact.exponent)) * _ULP
    _check(value, exact.value, np.abs(exact.value), bound + 10 * _ULP)
    _check(slope, exact.slope, exact.slope_size, bound + 20 * _ULP)

    few = np.float32([-3, -5, -8])
    right = act_parts(few, name).value
    value, _ = _on_gpu(ACTIVATIONS[name], few, *signs)
    assert np.abs(value / right - 1).max() <= 1e-5
    by_tanh = {"gelu": _gelu_by_tanh, "silu": _silu_by_tanh}[name]
    (value,) = _on_gpu(by_tanh, few, *signs)
    assert np.abs(value / right - 1).min() > 1e-3, "the model shows no error of the tanh form"
