"""The mean softmax map on any device: values, memory, and what is refused."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sparse_attention, mean_attention_map
from pallas_kernels.doctor.oracles import make_normal
from tests.kernels.oracles import softmax_maps
from tests.kernels.portable_forms import in_cpu_form, in_gpu_form
from tests.tiers import tier

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
average_maps = jit(mean_attention_map, static_argnames=("causal", "implementation"))


@pytest.fixture(autouse=True)
def _full_precision():
    # GPUs would otherwise round f32 operands to TF32.
    with jax.default_matmul_precision("highest"):
        yield


def _kernels_of(implementation):
    """Interpret the kernels of a backend where there is no GPU that they run on."""
    if implementation != "triton":
        return contextlib.nullcontext()
    # Skips the test, and not the file, where the extra is not installed.
    from tests.kernels.triton_interpreter import triton_kernels

    return triton_kernels()


def _draw(*shapes):
    return tuple(np.asarray(x) for x in make_normal(shapes))


_KINDS = {"plain": (False, False), "causal": (True, False), "padded": (False, True)}
_KINDS |= {"causal-padded": (True, True)}


@pytest.mark.parametrize("implementation", ["xla", "reference", "triton"])
@pytest.mark.parametrize("kind", tier(_KINDS, fast=["causal-padded"]))
def test_the_map_is_the_mean_of_the_softmax_maps(kind, implementation):
    causal, padded = kind
    q_BTNH, k_BSKH = _draw((2, 12, 4, 16), (2, 12, 2, 16))
    visible_BTS = np.ones((2, 12, 12), bool)
    kv_mask = None
    if causal:
        visible_BTS = np.tril(visible_BTS)
    if padded:
        # Under causality queries 0 to 2 of the second example see no key at all.
        kv_mask = np.arange(12) >= np.array([[0], [3]])
        visible_BTS = visible_BTS & kv_mask[:, None]
    options = {"causal": causal, "kv_mask_BS": kv_mask, "implementation": implementation}
    with _kernels_of(implementation):
        got = average_maps(q_BTNH, k_BSKH, **options)
    expected = softmax_maps(q_BTNH, k_BSKH, visible_BTS).mean((0, 1))
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert got.dtype == jnp.float32
    _, lse = block_sparse_attention(
        q_BTNH, k_BSKH, k_BSKH, None, block_q=12, block_kv=12, causal=causal,
        kv_mask=None if kv_mask is None else jnp.asarray(kv_mask), return_lse=True,
    )  # fmt: skip
    with _kernels_of(implementation):
        given = average_maps(q_BTNH, k_BSKH, **options, lse=lse)
        # It is the lse that normalizes: raised by log 2 it halves the map.
        halved = average_maps(q_BTNH, k_BSKH, **options, lse=lse + jnp.log(2.0))
    np.testing.assert_allclose(given, got, atol=1e-6)
    np.testing.assert_allclose(halved, got / 2, atol=1e-6)


def test_the_map_is_streamed_over_queries():
    # A head's map has 4 MB here, the maps of all heads 64 MB.
    shapes = [jax.ShapeDtypeStruct((4, 1024, 4, 8), jnp.float32)] * 2
    compiled = jit(mean_attention_map).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 24e6


# Named: a call that is not would look for kernels of the GPU that the form pretends.
_average_by_xla = functools.partial(mean_attention_map, implementation="xla")


@pytest.mark.ci
@pytest.mark.parametrize(
    ("average", "chunks"),
    [(in_cpu_form(_average_by_xla), 16), (in_gpu_form(_average_by_xla), 2)],
    ids=["cpu", "gpu"],
)
def test_a_map_that_is_streamed_has_its_values(average, chunks):
    q, k = _draw((4, 1024, 4, 8), (4, 1024, 4, 8))
    assert f"length={chunks}\n" in str(jax.make_jaxpr(average)(q, k))
    expected = softmax_maps(q, k, np.ones((4, 1024, 1024), bool)).mean((0, 1))
    np.testing.assert_allclose(jit(average)(q, k), expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_a_query_that_sees_nothing_has_an_empty_map(implementation):
    (q,) = _draw((1, 4, 2, 16))
    with _kernels_of(implementation):
        got = average_maps(q, q, kv_mask_BS=np.zeros((1, 4), bool), implementation=implementation)
    np.testing.assert_array_equal(got, np.zeros((4, 4)))


@pytest.mark.parametrize("implementation", ["xla", "reference", "triton"])
def test_removed_keys_have_no_effect_and_no_gradient_passes(implementation):
    q, k = _draw((1, 4, 2, 16), (1, 4, 2, 16))
    kv_mask = np.array([[True, True, False, True]])
    options = {"kv_mask_BS": kv_mask, "implementation": implementation}
    poisoned = np.where(kv_mask[:, :, None, None], k, np.nan)

    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(q, k):
        return (mean_attention_map(q, k, **options) ** 2).sum()

    with _kernels_of(implementation):
        dirty, clean = (average_maps(q, x, **options) for x in (poisoned, k))
        gradients = jit(gradient)(q, k)
    np.testing.assert_array_equal(dirty, clean)
    for x in gradients:
        np.testing.assert_array_equal(x, np.zeros_like(x))


_X = np.ones((2, 32, 4, 8), np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_BTNH": _X[0]}, r"q_BTNH must be \[B, T, N, H\] and not empty, got \[32, 4, 8\]"),
        ({"k_BSKH": _X[:, :0]}, r"k_BSKH must be .* not empty, got \[2, 0, 4, 8\]"),
        ({"q_BTNH": _X.astype(np.int32)}, "must share one of float32.* got int32 and float32"),
        ({"k_BSKH": _X.astype(jnp.bfloat16)}, "got float32 and bfloat16"),
        ({"k_BSKH": _X[:1]}, r"must share B and H.* got \[2, 32, 4, 8\] and \[1, 32, 4, 8\]"),
        ({"k_BSKH": _X[:, :, :3]}, r"key heads divide query heads, .* and \[2, 32, 3, 8\]"),
        ({"causal": 1}, "causal must be a bool, got causal=1"),
        (
            {"kv_mask_BS": np.ones((2, 32), np.float32)},
            r"kv_mask_BS must be bool\[2, 32\].*got float32",
        ),
        (
            {"lse": np.ones((2, 4, 32), np.float32)},
            r"lse must be float32\[2, 32, 4\].*got float32\[2, 4, 32",
        ),
        (
            {"implementation": "dense"},
            "None or one of .'mosaic_sm90', 'triton', 'reference', 'xla'.* 'dense'",
        ),
        ({"implementation": "cuda"}, "None or one of .* got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        mean_attention_map(**{"q_BTNH": _X, "k_BSKH": _X} | changes)
