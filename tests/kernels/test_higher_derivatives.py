"""Forward mode and Hessian products, where the docstrings say that an op has them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sparse_attention, block_sparse_matmul, nm_matmul
from pallas_kernels.doctor.oracles import make_nm_masks, make_normal

pytestmark = pytest.mark.ci


def _attention(implementation):
    mask = jnp.array([[True, False], [True, True]])[None, None]

    def run(x):
        q, k, v = x
        out, lse = block_sparse_attention(
            q, k, v, mask, block_q=4, block_kv=4, pruned_logits="zero", return_lse=True,
            implementation=implementation,
        )  # fmt: skip
        return (out**2).sum() + lse.sum()

    return run, make_normal(((1, 8, 2, 4),) * 3)


def _block_matmul(implementation):
    mask = jnp.array([[True, False], [True, True]])

    def run(x):
        return (block_sparse_matmul(*x, mask, implementation=implementation) ** 3).sum()

    return run, make_normal(((3, 8), (8, 6)))


def _nm_matmul(implementation):
    mask = jnp.asarray(make_nm_masks((8, 6), (2, 4))["whole"])

    def run(x):
        x, w = x
        y = nm_matmul(x, w, mask, activation="gelu", implementation=implementation)
        return (y**2).sum()

    x, w = make_normal(((3, 8), (8, 6)))
    return run, (x, jnp.where(mask, w, 0))


_OPS = {"attention": _attention, "block_matmul": _block_matmul, "nm_matmul": _nm_matmul}
_PLAIN = [("attention", "reference"), ("attention", "dense")]
_PLAIN += [("block_matmul", "reference"), ("nm_matmul", "reference")]
_FAST = [(op, "xla") for op in _OPS]


def _direction(inputs):
    # Straight through: the value says nothing about the gradient of what is pruned, here 0.
    directions = make_normal([x.shape for x in inputs], seed=3)
    return tuple(jnp.where(x == 0, 0, t) for x, t in zip(inputs, directions, strict=True))


@pytest.mark.parametrize(("op", "implementation"), _PLAIN)
def test_forward_mode_agrees_with_reverse_mode(op, implementation):
    run, inputs = _OPS[op](implementation)
    direction = _direction(inputs)
    _, forward = jax.jit(lambda x, t: jax.jvp(run, (x,), (t,)))(inputs, direction)
    gradients = jax.jit(jax.grad(run))(inputs)
    reverse = sum((g * t).sum() for g, t in zip(gradients, direction, strict=True))
    np.testing.assert_allclose(forward, reverse, rtol=1e-4)


@pytest.mark.parametrize(("op", "implementation"), _PLAIN + _FAST)
def test_hessian_products_are_differences_of_gradients(op, implementation):
    run, inputs = _OPS[op](implementation)
    direction = _direction(inputs)
    gradient = jax.jit(jax.grad(run))
    _, got = jax.jit(lambda x, t: jax.jvp(jax.grad(run), (x,), (t,)))(inputs, direction)
    step = 2.0**-7
    ends = [jax.tree.map(lambda x, t, h=h: x + h * t, inputs, direction) for h in (step, -step)]
    after, before = (gradient(x) for x in ends)
    for one, two, mine in zip(after, before, got, strict=True):
        expected = (one - two) / (2 * step)
        np.testing.assert_allclose(mine, expected, atol=2e-2 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize(("op", "implementation"), _PLAIN)
def test_reverse_mode_twice_agrees_with_forward_over_reverse(op, implementation):
    run, inputs = _OPS[op](implementation)
    direction = _direction(inputs)

    def along(x):
        return sum((g * t).sum() for g, t in zip(jax.grad(run)(x), direction, strict=True))

    got = jax.jit(jax.grad(along))(inputs)
    _, expected = jax.jit(lambda x, t: jax.jvp(jax.grad(run), (x,), (t,)))(inputs, direction)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3 * float(jnp.abs(y).max()))


@pytest.mark.parametrize("op", _OPS)
def test_forward_mode_of_a_fast_backend_is_refused(op):
    run, inputs = _OPS[op]("xla")
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(run, (inputs,), (_direction(inputs),))
