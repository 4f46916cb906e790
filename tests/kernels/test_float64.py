"""Every op against float64, over magnitudes that training meets and those it should not meet.

Each program is compiled once; data and masks change. Bounds are shares of the right value (or of
the terms it is a sum of) and come from counting roundings: see `float64`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    block_sparse_attention,
    block_sparse_matmul,
    mean_attention_map,
    nm_matmul,
)
from pallas_kernels.doctor.oracles import make_nm_masks, make_normal, value_and_gradients
from tests.kernels import float64
from tests.kernels.implementations import interpret
from tests.tiers import tier

BLOCK, LENGTH, HEADS, KV_HEADS, DIM = 8, 32, 4, 2, 4
SCALE = 0.5  # DIM**-0.5
MAGNITUDES = [2.0**-10, 1.0, 32.0, 96.0, 1024.0]


@pytest.fixture(autouse=True)
def _full_precision():
    # GPUs would otherwise round f32 operands to TF32.
    with jax.default_matmul_precision("highest"):
        yield


def _make_logits(magnitude, sign, batch=1):
    """Return q and k whose logits are exact in f32 and as large as `magnitude`.

    The first channel holds what all logits share, `sign * magnitude`; the others hold small
    integers times a power of two, which spread them by up to 4, or by `magnitude` if sign is 0.
    """
    rng = np.random.default_rng(3)
    q = rng.integers(-4, 5, (batch, LENGTH, HEADS, DIM)).astype(np.float32)
    k = rng.integers(-4, 5, (batch, LENGTH, KV_HEADS, DIM)).astype(np.float32)
    k *= (magnitude if sign == 0 else min(magnitude, 4.0)) / 32
    q[..., 0] = 8.0
    k[..., 0] = sign * magnitude / 4
    return q, k


def _make_block_masks():
    """Return block masks: one with a full row and an empty one, and both extremes."""
    mask = np.random.default_rng(4).random((1, HEADS, 4, 4)) < 0.5
    mask[..., 0, :], mask[..., 1, :] = True, False
    mask[..., 3, :2] = True, False
    return {"some": mask, "full": np.ones_like(mask), "none": np.zeros_like(mask)}


@functools.cache
def _judge_attention(magnitude, sign, mask_name, causal, rule):
    q, k = _make_logits(magnitude, sign)
    (v,) = make_normal((k.shape,))
    cotangents = make_normal((q.shape, q.shape[:3]), seed=1)
    mask = _make_block_masks()[mask_name]
    judged = float64.attention(
        q, k, v, mask.repeat(BLOCK, 2).repeat(BLOCK, 3), *cotangents,
        scale=SCALE, causal=causal, zero=rule == "zero",
    )  # fmt: skip
    return (q, k, v), cotangents, mask, judged


_KINDS = {"masked": ("masked", False), "masked-causal": ("masked", True)}
_KINDS |= {"zero": ("zero", False), "zero-causal": ("zero", True)}


@pytest.mark.parametrize("implementation", ["reference", "dense", "xla"])
@pytest.mark.parametrize("kind", tier(_KINDS, fast=["zero-causal"]))
def test_attention(kind, implementation):
    rule, causal = kind
    options = {"block_q": BLOCK, "block_kv": BLOCK, "causal": causal, "pruned_logits": rule}
    options |= {"return_lse": True, "implementation": implementation}

    @jax.jit
    def run(inputs, cotangents, mask):
        return value_and_gradients(
            lambda *x: block_sparse_attention(*x, mask, **options), inputs, cotangents
        )

    for magnitude in MAGNITUDES:
        for sign in (1, -1, 0):
            for mask_name in _make_block_masks():
                case = (magnitude, sign, mask_name, causal, rule)
                inputs, cotangents, mask, judged = _judge_attention(*case)
                got = run(inputs, cotangents, mask)
                for (name, right), x in zip(judged.items(), got, strict=True):
                    right.check(x, f"{name} of {case}")


@pytest.mark.ci
@pytest.mark.parametrize("implementation", ["reference", "dense", "xla"])
def test_equal_logits_of_any_size(implementation):
    mask = jnp.ones((1, 1, 2, 2), bool)
    options = {"block_q": 16, "block_kv": 16, "return_lse": True, "implementation": implementation}
    ones = jnp.ones((1, 32, 1, 16))
    for rule in ("masked", "zero"):
        for sign in (1, -1):
            out, lse = block_sparse_attention(
                5 * ones, sign * 5 * ones, ones, mask, pruned_logits=rule, **options
            )
            np.testing.assert_allclose(out, ones, rtol=1e-6)
            np.testing.assert_allclose(lse, sign * 100 + np.log(32), rtol=1e-6)


@pytest.mark.ci
@pytest.mark.parametrize("rule", ["masked", pytest.param("zero", marks=pytest.mark.slow)])
@pytest.mark.parametrize("implementation", ["triton", "mosaic_sm90"])
def test_large_logits_in_interpreted_kernels(implementation, rule):
    dtype = {"triton": np.float32, "mosaic_sm90": jnp.bfloat16}[implementation]
    # A row of blocks that keeps everything, and one that keeps nothing; kernels take such blocks.
    mask, block, dim = np.array([[True, True], [False, False]])[None, None], 64, 32
    options = {"block_q": block, "block_kv": block, "pruned_logits": rule, "scale": 1.0}
    options |= {"return_lse": True, "implementation": implementation}
    shape = (1, 2 * block, 1, dim)
    (v,) = (np.asarray(x, dtype) for x in make_normal((shape,)))
    cotangents = make_normal((shape, shape[:3]), seed=1)
    cotangents = tuple(np.asarray(np.asarray(x, dtype), np.float32) for x in cotangents)

    def run(inputs, cotangents):
        return value_and_gradients(
            lambda *x: block_sparse_attention(*x, jnp.asarray(mask), **options), inputs, cotangents
        )

    for sign in (1, -1):
        q, k = np.zeros(shape, dtype), np.zeros(shape, dtype)
        # All logits of every row are 96 or -96, and differ by less than 2.
        q[..., 0], k[..., 0] = 8, sign * 12
        q[..., 1], k[..., 1] = 1, (np.arange(2 * block) % 4 / 2)[:, None]
        judged = float64.attention(
            q, k, v, mask.repeat(block, 2).repeat(block, 3), *cotangents,
            scale=1.0, causal=False, zero=rule == "zero",
        )  # fmt: skip
        with interpret(implementation):
            got = jax.block_until_ready(jax.jit(run)((q, k, v), cotangents))
        for (name, right), x in zip(judged.items(), got, strict=True):
            # Probabilities and gradients are rounded to bf16: off by about one part in a hundred.
            wider = 2.0**9 if dtype is jnp.bfloat16 and name != "lse" else 8.0
            right._replace(bound=wider * right.bound + 1e-6).check(x, f"{name}, sign {sign}")


def _average_interpreted(q, k, **options):
    """Average with the Triton kernels, which take 16 channels and more."""
    from tests.kernels.triton_interpreter import triton_kernels

    # Four times the channels halve the scale.
    q, k = (jnp.pad(x, ((0, 0),) * 3 + ((0, 3 * DIM),)) for x in (2 * q, k))
    with triton_kernels():
        return mean_attention_map(q, k, **options)


@pytest.mark.parametrize(
    "implementation", ["reference", "xla", pytest.param("triton", marks=pytest.mark.ci)]
)
@pytest.mark.parametrize("causal", [pytest.param(False, marks=pytest.mark.ci), True])
def test_mean_map(causal, implementation):
    # Under causality the first queries of the second example see no key.
    kv_mask = np.arange(LENGTH) >= np.array([[0], [3]])
    visible = np.tri(LENGTH, dtype=bool) if causal else np.ones((LENGTH, LENGTH), bool)
    attended = visible & kv_mask[:, None, None]
    run = jax.jit(
        functools.partial(
            _average_interpreted if implementation == "triton" else mean_attention_map,
            causal=causal,
            kv_mask_BS=kv_mask,
            implementation=implementation,
        )
    )
    for magnitude in MAGNITUDES:
        for sign in (1, -1, 0):
            q, k = _make_logits(magnitude, sign, batch=2)
            right = float64.mean_map(q, k, attended)
            right.check(run(q, k), f"{magnitude}, {sign}")
            _, lse, _ = float64.attention_softmax(q, k, attended, 0, SCALE)
            lse = lse.swapaxes(1, 2).astype(np.float32)
            right.check(run(q, k, lse=lse), f"{magnitude}, {sign}, lse given")


def _compile_matmul(multiply):
    @jax.jit
    def run(x, w, bias, dy, *masks):
        y, back = jax.vjp(lambda x, w, b: multiply(x, w, b, *masks), x, w, bias)
        return dict(zip(("y", "dx", "dw", "dbias"), (y, *back(dy)), strict=True))

    return run


SCALES = [(1e-3, 1e-3), (1e-3, 1e3), (1.0, 1.0), (1e3, 1e-3), (1e3, 1e3)]


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_block_matmul(implementation):
    run = _compile_matmul(
        lambda x, w, bias, mask, grad_mask: block_sparse_matmul(
            x, w, mask, grad_mask=grad_mask, bias=bias, implementation=implementation
        )
    )
    x, w, bias, dy = make_normal(((12, 32), (32, 48), (48,), (12, 48)))
    rng = np.random.default_rng(5)
    some, others = rng.random((2, 4, 3)) < 0.5
    some[:, 0], some[1] = False, True
    full = np.ones_like(some)
    for mask, grad_mask in ((some, some), (some, others), (full, full), (~full, full)):
        kept, wanted = (m.repeat(8, 0).repeat(16, 1) for m in (mask, grad_mask))
        for x_scale, w_scale in SCALES:
            case = x * x_scale, w * w_scale, bias * x_scale * w_scale, dy / x_scale
            judged = float64.matmul(*case[:2], kept, wanted, *case[2:])
            got = run(*case, mask, grad_mask)
            for name, right in judged.items():
                right.check(got[name], f"{name} at {x_scale}, {w_scale}")


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_nm_matmul(implementation):
    run = _compile_matmul(
        lambda x, w, bias, mask: nm_matmul(x, w, mask, bias=bias, implementation=implementation)
    )
    x, w, bias, dy = make_normal(((12, 32), (32, 48), (48,), (12, 48)))
    for mask in make_nm_masks(w.shape, (2, 4)).values():
        for x_scale, w_scale in SCALES:
            case = x * x_scale, w * w_scale, bias * x_scale * w_scale, dy / x_scale
            judged = float64.matmul(*case[:2], mask, np.ones_like(mask), *case[2:])
            got = run(*case, mask)
            for name, right in judged.items():
                right.check(got[name], f"{name} at {x_scale}, {w_scale}")


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("activation", ["gelu", "geglu", "swiglu"])
def test_nm_matmul_with_activation(activation, implementation):
    run = _compile_matmul(
        lambda x, w, bias, mask: nm_matmul(
            x, w, mask, bias=bias, activation=activation, implementation=implementation
        )
    )
    rng = np.random.default_rng(6)
    x, w, bias = (rng.integers(-4, 5, n).astype(np.float32) for n in ((24, 16), (16, 24), 24))
    # Pre-activations that are everywhere far below zero, and far above.
    bias[:3], bias[-3:], bias[3:6], bias[-6:-3] = -40, -40, 40, 40
    (dy,) = make_normal(((24, 24 if activation == "gelu" else 12),), seed=1)
    mask = make_nm_masks(w.shape, (2, 4))["underfull"]
    # Integers times powers of two: pre-activations are exact, from 1e-3 to several thousand.
    for power in (-14, -5, -3, -1, 0, 3, 7):
        for x_power in (-10, 0, 10):
            case = x * 2.0**x_power, w * 2.0 ** (power - x_power), bias * 2.0**power
            judged = float64.activated_matmul(*case[:2], mask, case[2], dy, activation)
            got = run(*case, dy, mask)
            got["dbias"] = got["dbias"][None]
            for name, right in judged.items():
                right.check(got[name], f"{name} at 2^{power}, x of 2^{x_power}")
