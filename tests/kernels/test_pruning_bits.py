"""Random bits that were drawn before prune as the key that they were drawn from."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import draw_pruning_bits, nm_matmul
from pallas_kernels.nm_matmul.mvue import prune_tokens, take_bits
from tests.kernels.nm_contract import NM_CASES, check_bits_of_a_key
from tests.tiers import tier

# The leading axes of x, and those of its bits.
_SHAPES = {
    "one token": ((), (1,)),
    "tokens": ((8,), (2,)),
    "odd tokens": ((6,), (2,)),
    "batch": ((3, 8), (3, 2)),
    "groups across examples": ((3, 6), (5,)),
    "two leading axes": ((2, 3, 4), (2, 3, 1)),
}
_CASES = {
    "tokens": dataclasses.replace(NM_CASES["mvue"], leading=(24,)),
    "odd tokens": NM_CASES["mvue_exact"],
    "batch": dataclasses.replace(NM_CASES["bf16_mvue"], leading=(2, 12), activation="swiglu"),
}


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("case", tier(_CASES, fast=["batch"]))
def test_bits_are_those_of_their_key(case, implementation):
    check_bits_of_a_key(case, implementation)


@pytest.mark.parametrize("shape", _SHAPES.values(), ids=_SHAPES)
def test_bits_are_shaped_like_the_groups(shape):
    leading, groups = shape
    key = jax.random.key(0)
    bits = draw_pruning_bits(key, (*leading, 16), 12)
    assert bits.dtype == jnp.uint32 and bits.shape == (*groups, 12)
    expected = jax.random.bits(key, (int(np.prod(groups)), 12), jnp.uint32)
    np.testing.assert_array_equal(bits.reshape(-1, 12), expected)


def test_a_key_is_one_typed_key():
    with pytest.raises(ValueError, match=r"key must be one typed key, .* got uint32\[2\]"):
        draw_pruning_bits(jnp.zeros(2, jnp.uint32), (8, 16), 12)


@pytest.mark.parametrize("seed", range(3))
def test_padding_does_not_change_the_bits_of_a_token(seed):
    key = jax.random.key(seed)
    bits = draw_pruning_bits(key, (6, 16), 12)
    np.testing.assert_array_equal(take_bits(key, 64, 12)[:2], take_bits(bits, 64, 12)[:2])
    zeros = jnp.zeros((8, 12)).at[:6].set(1)
    for draws in (key, bits):
        assert not prune_tokens(zeros, draws, "mvue")[6:].any()


@pytest.mark.parametrize(
    ("tokens", "leading"), [((2, 12), (6,)), ((2, 12), (2, 1, 3)), ((24,), (2, 3)), ((3,), ())]
)
def test_any_leading_axes_give_one_order_of_groups(tokens, leading):
    case = dataclasses.replace(_CASES["batch"], leading=tokens)
    x, w, _ = case.inputs()
    mask = case.masks()["whole"]
    bits = draw_pruning_bits(jax.random.key(0), x.shape, w.shape[1])

    def gradient(bits):
        def loss(w):
            y = nm_matmul(x, w, mask, grad_pruning="mvue", bits=bits, implementation="xla")
            return (y.astype(jnp.float32) ** 2).sum()

        return jax.grad(loss)(w)

    shape = (*leading, w.shape[1])
    np.testing.assert_array_equal(
        *(np.asarray(gradient(b), np.float32) for b in (bits, bits.reshape(shape)))
    )


def test_bits_have_no_gradient_and_vmap_maps_them():
    case = _CASES["tokens"]
    x, w, _ = case.inputs()
    mask = case.masks()["whole"]
    options = {"grad_pruning": "mvue", "implementation": "xla"}
    keys = jax.random.split(jax.random.key(0), 3)
    draw = functools.partial(draw_pruning_bits, x_shape=x.shape, columns=w.shape[1])
    bits = jax.vmap(draw)(keys)

    def loss(w, bits):
        return (nm_matmul(x, w, mask, bits=bits, **options) ** 2).sum()

    gradient = jax.grad(loss, argnums=(0, 1), allow_int=True)
    together, none = jax.vmap(gradient, (None, 0))(w, bits)
    assert none.dtype == jax.dtypes.float0
    apart = [gradient(w, b)[0] for b in bits]
    np.testing.assert_allclose(together, jnp.stack(apart), rtol=1e-5, atol=1e-5)
