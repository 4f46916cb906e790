"""The best 2:4 pattern of every tile, by all backends: against brute force, and invariants."""

import contextlib
import functools

import hypothesis
import hypothesis.extra.numpy as hypothesis_numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import choose_implementation, record_choices, transposable_mask
from pallas_kernels.transposable_mask import xla
from pallas_kernels.transposable_mask.call import TransposableFacts
from sparsejax.masks import retained_l1
from tests.kernels.transposable_contract import (
    LEGAL,
    check_best_and_first,
    check_equals_xla,
    check_exact,
    check_not_finite,
    is_legal,
    make_adversarial,
    make_tied_in_bf16,
    to_tiles,
    to_totals,
)
from tests.tiers import tier


@contextlib.contextmanager
def use(implementation):
    """Yield the search by one backend; the Triton kernel is interpreted without a GPU."""
    with contextlib.ExitStack() as stack:
        if implementation == "triton":
            # Where the extra is not installed, this skips the test and no other.
            from tests.kernels.triton_interpreter import triton_kernels

            stack.enter_context(triton_kernels())
        yield functools.partial(transposable_mask, implementation=implementation)


@pytest.fixture(params=tier({n: n for n in ("xla", "triton", "reference")}, fast=["xla"]))
def search(request):
    with use(request.param) as function:
        yield function


@pytest.fixture
def triton():
    with use("triton") as function:
        yield function


def test_there_are_ninety_patterns():
    assert len(LEGAL) == 90


def test_the_best_pattern_wins_and_of_equals_the_first(search):
    check_exact(search)


def test_ties_of_bf16_are_those_of_exact_arithmetic(search):
    w = make_tied_in_bf16()
    tied = (to_totals(w) == to_totals(w).max(1, keepdims=True)).sum(1) > 1
    assert tied.sum() > 50
    check_best_and_first(w, search(jnp.array(w, jnp.bfloat16)))


def test_nan_infinite_and_huge_weights_stay_legal_and_are_kept(search):
    check_not_finite(search)


@pytest.mark.ci
def test_gaussian_tiles_keep_what_brute_force_keeps(search):
    w = np.random.default_rng(0).standard_normal((8, 64, 64)).astype(np.float32)
    exact = np.abs(to_tiles(w.astype(np.float64))).reshape(-1, 16)
    best = (exact @ LEGAL.reshape(-1, 16).T).max(1)
    mask = search(jnp.array(w))
    kept = (exact * to_tiles(np.array(mask)).reshape(-1, 16)).sum(1)
    assert (kept >= best * (1 - 4e-7)).all()
    assert is_legal(mask)


@pytest.mark.ci
def test_gaussian_weights_keep_the_known_share():
    w = jax.random.normal(jax.random.key(0), (4, 512, 512))
    # The standard deviation over 2^20 weights is 2.3e-4.
    np.testing.assert_allclose(retained_l1(w, transposable_mask(w)).mean(), 0.7024, atol=1e-3)


@pytest.mark.ci
def test_leading_axes_jit_and_vmap_change_nothing(search):
    w = jnp.array(make_adversarial(1), jnp.float32) + jax.random.normal(
        jax.random.key(1), (8, 64, 64)
    )
    mask = search(w)
    assert mask.dtype == jnp.bool_ and mask.shape == w.shape
    for other in (
        search(w.reshape(2, 4, 64, 64)).reshape(w.shape),
        jax.jit(search)(w),
        jax.vmap(search)(w),
        jax.vmap(jax.vmap(search))(w.reshape(2, 4, 64, 64)).reshape(w.shape),
        jnp.stack([search(layer) for layer in w]),
    ):
        np.testing.assert_array_equal(other, mask)


@pytest.mark.ci
def test_no_gradient_passes(search):
    w = jax.random.normal(jax.random.key(3), (8, 8))
    gradient = jax.grad(lambda w: (w * search(w)).sum())(w)
    np.testing.assert_array_equal(gradient, search(w))


@pytest.mark.ci
@pytest.mark.parametrize("at_a_time", [1, 2, 3])
def test_pieces_join_where_they_do_not_divide(at_a_time):
    strips = jax.random.normal(jax.random.key(2), (5, 4, 32))
    whole = xla._search_in_pieces(strips, 5)
    np.testing.assert_array_equal(xla._search_in_pieces(strips, at_a_time), whole)


@pytest.mark.ci
def test_memory_does_not_grow_with_the_weights():
    w = jax.ShapeDtypeStruct((64, 512, 512), jnp.float32)
    memory = jax.jit(transposable_mask).lower(w).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8e6 < w.size


# One tile; tiles that fill no program; rows that end inside of one; several programs.
SHAPES = {
    "one tile": (4, 4),
    "few tiles": (8, 20),
    "rows end inside": (12, 516),
    "three axes": (3, 8, 260),
    "whole programs": (8, 1024),
}


@pytest.mark.parametrize("dtype", tier({d: d for d in ("float32", "float16")}, fast=["float32"]))
@pytest.mark.parametrize("shape", tier(SHAPES, fast=["rows end inside"]))
def test_the_kernel_and_xla_agree_to_the_bit(triton, shape, dtype):
    check_equals_xla(triton, shape, dtype)


@pytest.mark.slow
@hypothesis.settings(derandomize=True, deadline=None, max_examples=50)
@hypothesis.given(
    layers=st.integers(1, 3),
    tiles=st.tuples(st.integers(1, 5), st.integers(1, 300)),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_any_shape_agrees_with_xla(layers, tiles, dtype):
    with use("triton") as search:
        check_equals_xla(search, (layers, 4 * tiles[0], 4 * tiles[1]), dtype)


def test_vmap_folds_its_axes_into_one_launch(triton):
    w = jax.ShapeDtypeStruct((2, 3, 8, 12), jnp.float32)
    text = str(jax.make_jaxpr(jax.vmap(jax.vmap(triton)))(w))
    assert text.count("pure_callback[") == 1 and "bool[48,12]" in text


_REFUSED = {
    "dtype": ({"dtype": "float64"}, "takes .*'float32'.*, got float64"),
    "size": ({"rows": 2**21, "columns": 2**15}, "in 32 bits, got 2097152 x 32768 weights"),
}


@pytest.mark.parametrize("name", _REFUSED)
def test_what_the_kernel_does_not_do_is_refused_with_the_reason(triton, name):
    changes, message = _REFUSED[name]
    facts = TransposableFacts(**{"rows": 8, "columns": 8, "dtype": "float32", **changes})
    with pytest.raises(NotImplementedError, match=message):
        choose_implementation("transposable_mask", facts, "triton")


def test_the_choice_is_recorded_for_the_rows_of_all_layers():
    with record_choices() as choices:
        jax.eval_shape(transposable_mask, jax.ShapeDtypeStruct((3, 8, 12), jnp.bfloat16))
    (choice,) = choices
    assert choice.backend == "xla" and choice.call == "transposable_mask(dtype=bfloat16)"
    assert choice.facts == TransposableFacts(rows=24, columns=12, dtype="bfloat16")


@pytest.mark.parametrize("implementation", tier({n: n for n in ("xla", "triton")}, fast=["xla"]))
@hypothesis.settings(derandomize=True, deadline=None, max_examples=50)
@hypothesis.given(
    w=hypothesis_numpy.arrays(np.int64, (16, 16), elements=st.integers(-20, 20)),
    exponent=st.integers(-40, 40),
    signs=hypothesis_numpy.arrays(np.int64, (16, 16), elements=st.sampled_from([-1, 1])),
)
def test_scale_signs_and_transposition(implementation, w, exponent, signs):
    with use(implementation) as search:
        mask = search(jnp.array(w, jnp.float32))
        scaled = np.ldexp((w * signs).astype(np.float32), exponent)
        np.testing.assert_array_equal(search(jnp.array(scaled)), mask)
        turned = np.array(search(jnp.array(w.T, jnp.float32))).T
    check_best_and_first(w, mask)

    kept, kept_turned = (np.abs(to_tiles(w)) * to_tiles(m) for m in (np.array(mask), turned))
    np.testing.assert_array_equal(kept.sum((1, 2)), kept_turned.sum((1, 2)))
    totals = to_totals(w)
    unique = (totals == totals.max(1, keepdims=True)).sum(1) == 1
    np.testing.assert_array_equal(to_tiles(np.array(mask))[unique], to_tiles(turned)[unique])


@pytest.mark.parametrize(
    ("w", "message"),
    [
        (jnp.zeros((6, 8)), r"w.shape=\(6, 8\)"),
        (jnp.zeros((2, 8, 10)), r"w.shape=\(2, 8, 10\)"),
        (jnp.zeros(16), r"w.shape=\(16,\)"),
        (jnp.zeros((0, 4, 4)), r"w.shape=\(0, 4, 4\)"),
        (jnp.zeros((4, 4), jnp.int32), "w.dtype=int32"),
    ],
)
def test_bad_weights_are_named(w, message):
    with pytest.raises(ValueError, match=message):
        transposable_mask(w)
