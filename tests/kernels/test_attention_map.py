"""The averaged softmax map: streamed, as its equation, and on Hopper (interpreted or there)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import aot, block_sparse_attention, mean_attention_map
from pallas_kernels.attention_map import op
from pallas_kernels.attention_map.mosaic_sm90 import mean_attention_map_mosaic_sm90
from pallas_kernels.attention_map.xla import log_sum_exp
from tests.kernels.interpreter import hopper
from tests.kernels.oracles import error, make_normal, softmax_maps

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


average_maps = jit(mean_attention_map, static_argnames=("causal", "implementation"))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_mean_attention_map_is_the_mean_of_the_softmax_maps(causal, padded, implementation):
    q_BTNH, k_BSKH = draw(2, 12, 4, 8), draw(2, 12, 2, 8, seed=1)
    visible_BTS = np.ones((2, 12, 12), bool)
    kv_mask = None
    if causal:
        visible_BTS = np.tril(visible_BTS)
    if padded:
        # Under causality queries 0 to 2 of the second example see no key at all.
        kv_mask = np.arange(12) >= np.array([[0], [3]])
        visible_BTS = visible_BTS & kv_mask[:, None]
    options = {"causal": causal, "implementation": implementation}
    got = average_maps(q_BTNH, k_BSKH, **options, kv_mask_BS=kv_mask)
    expected = softmax_maps(q_BTNH, k_BSKH, visible_BTS).mean((0, 1))
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert got.dtype == jnp.float32


def test_the_map_is_streamed_over_queries():
    # A head's map has 4 MB here, the maps of all heads 64 MB.
    shapes = [jax.ShapeDtypeStruct((4, 1024, 4, 8), jnp.float32)] * 2
    compiled = jit(mean_attention_map).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 24e6
    q, k = draw(4, 1024, 4, 8), draw(4, 1024, 4, 8, seed=1)
    expected = softmax_maps(q, k, np.ones((4, 1024, 1024), bool)).mean((0, 1))
    np.testing.assert_allclose(compiled(q, k), expected, atol=1e-7, rtol=1e-5)


def test_a_query_that_sees_nothing_has_an_empty_map():
    q = draw(1, 4, 2, 8)
    got = average_maps(q, q, kv_mask_BS=np.zeros((1, 4), bool))
    np.testing.assert_array_equal(got, np.zeros((4, 4)))


def test_the_denominators_are_those_of_attention():
    q, k = draw(2, 12, 4, 8), draw(2, 12, 2, 8, seed=1)
    kv_mask = np.arange(12) >= np.array([[0], [3]])
    for options in ({}, {"kv_mask": kv_mask}, {"causal": True, "kv_mask": kv_mask}):
        _, expected = block_sparse_attention(
            q, k, k, None, block_q=12, block_kv=12, return_lse=True, **options
        )
        causal = options.get("causal", False)
        got = log_sum_exp(q, k, options.get("kv_mask"), causal=causal)
        assert error(got, expected) < 1e-5


# Two tiles a side, and more heads than the ring holds.
HOPPER_CASES = {
    "causal_grouped": dict(batch=1, length=256, heads=(4, 2), head_dim=64, causal=True),
    "padded_f16": dict(batch=2, length=128, heads=(2, 2), head_dim=128, dtype="float16"),
    "wide": dict(batch=2, length=256, heads=(2, 1), head_dim=128, padded=True, causal=True),
}


def make_hopper_case(*, batch, length, heads, head_dim, dtype="bfloat16", padded=None, **options):
    q, k = make_normal([(batch, length, n, head_dim) for n in heads], dtype)
    if padded or dtype == "float16":
        # The first query of an example sees nothing under causality.
        real = jnp.arange(length) >= jnp.arange(batch)[:, None]
        options["kv_mask_BS"] = real & (jnp.arange(length) < length - 40)
    return q, k, options


def check_hopper_case(q, k, options, **more):
    with hopper():
        got = jit(
            functools.partial(
                mean_attention_map,
                implementation="mosaic_sm90",
                causal=options.get("causal", False),
            )
        )(q, k, kv_mask_BS=options.get("kv_mask_BS"), **more)
    exact = mean_attention_map(q, k, **options, implementation="reference")
    # Products of 16-bit operands in f32 are exact; what is left are f32 sums and exp2.
    assert got.dtype == jnp.float32 and error(got, exact) < 2e-6
    return got


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n == "wide" else ()) for n in HOPPER_CASES],
)
def test_hopper_kernel(name):
    q, k, options = make_hopper_case(**HOPPER_CASES[name])
    got = check_hopper_case(q, k, options)
    if options.get("causal"):
        assert not np.triu(got, 1).any()


def test_hopper_kernel_takes_the_denominators_of_attention():
    q, k, options = make_hopper_case(batch=1, length=128, heads=(2, 1), head_dim=64)
    _, lse = block_sparse_attention(
        q, k, k, None, block_q=128, block_kv=128, return_lse=True, implementation="dense"
    )
    check_hopper_case(q, k, options, lse_BTN=lse)
    with pytest.raises(AssertionError):
        check_hopper_case(q, k, options, lse_BTN=lse + 0.01)


def _forget_the_mean(*args, **options):
    return mean_attention_map_mosaic_sm90(*args, **options) * 2


def _see_one_key_ahead(q, k, kv_mask, lse, *, causal):
    del causal
    got = mean_attention_map_mosaic_sm90(q, k, kv_mask, lse, causal=False)
    return jnp.tril(got, 1)


def _leave_padding(q, k, kv_mask, lse, *, causal):
    return mean_attention_map_mosaic_sm90(q, k, jnp.ones_like(kv_mask), lse, causal=causal)


@pytest.mark.parametrize("broken", [_forget_the_mean, _see_one_key_ahead, _leave_padding])
def test_broken_kernels_are_noticed(broken, monkeypatch):
    monkeypatch.setattr(op, "mean_attention_map_mosaic_sm90", broken)
    case = dict(batch=2, length=128, heads=(1, 1), head_dim=64, causal=True, padded=True)
    with pytest.raises(AssertionError):
        check_hopper_case(*make_hopper_case(**case))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("padded", [False, True])
def test_hopper_kernel_compiled_for_an_h200(head_dim, padded):
    q = jax.ShapeDtypeStruct((4, 4096, 12, head_dim), jnp.bfloat16)
    lse = jax.ShapeDtypeStruct((4, 4096, 12), jnp.float32)
    kv_mask = jax.ShapeDtypeStruct((4, 4096), jnp.bool_) if padded else None

    def probe(q, k, lse, kv_mask):
        return mean_attention_map(
            q,
            k,
            causal=not padded,
            kv_mask_BS=kv_mask,
            lse_BTN=lse,
            implementation="mosaic_sm90",
        )

    report = aot.compile_for(probe, q, q, lse, kv_mask)
    (kernel,) = report.kernels
    assert kernel.spill_bytes == 0 and kernel.stack_bytes == 0, kernel
    assert kernel.shared_memory_bytes <= aot.H200.shared_memory_per_block_bytes, kernel
    assert not kernel.is_serialized and "HGMMA" in kernel.sass and "UTMALDG" in kernel.sass
    # The maps of all heads would take 3.2 GB, one map 67 MB.
    assert report.temp_bytes < 4e6


@pytest.mark.parametrize(
    ("changes", "error_type", "message"),
    [
        ({"q_BTNH": jnp.ones((2, 8, 2))}, ValueError, r"q must be \[B, T, N, H\] and k"),
        ({"k_BSKH": jnp.ones((1, 8, 3, 4))}, ValueError, "the heads of k must divide those of q"),
        ({"k_BSKH": jnp.ones((1, 8, 2, 4), "bfloat16")}, ValueError, "share a floating dtype"),
        ({"kv_mask_BS": jnp.ones((1, 8))}, ValueError, r"kv_mask_BS must be bool\[1, 8\] or None"),
        ({"lse_BTN": jnp.ones((1, 2, 8))}, ValueError, r"lse_BTN must be f32\[1, 8, 2\], got"),
        ({"implementation": "dense"}, ValueError, "implementation must be None or one of"),
    ],
)
def test_bad_arguments_are_named(changes, error_type, message):
    x = jnp.ones((1, 8, 2, 4))
    with pytest.raises(error_type, match=message):
        mean_attention_map(**{"q_BTNH": x, "k_BSKH": x} | changes)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 128, 1, 64), "float32", "takes bfloat16 and float16, got float32"),
        ((1, 128, 1, 32), "bfloat16", r"takes head dims \(64, 128\), got 32"),
        ((1, 192, 1, 64), "bfloat16", "multiples of 128, got 192 queries and 192 keys"),
    ],
)
def test_what_the_kernel_does_not_do_is_refused(shape, dtype, message):
    x = jnp.ones(shape, dtype)
    with hopper(), pytest.raises(NotImplementedError, match=message):
        mean_attention_map(x, x, implementation="mosaic_sm90")
