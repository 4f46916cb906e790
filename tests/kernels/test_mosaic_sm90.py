"""The Hopper kernels against the contract: interpreted, or on a GPU where there is one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pallas_kernels import block_sparse_attention
from pallas_kernels.doctor.oracles import error, make_normal
from tests.kernels import interpreter
from tests.kernels.contract import (
    Case,
    call_implementation,
    check_case,
    compile_case,
    has_select,
    with_a_block_dropped,
    with_untransposed_lists,
)
from tests.kernels.interpreter import give_back_early, hopper, miss_barrier
from tests.tiers import tier

_SMALL = Case(
    batch=1, num_heads=1, num_kv_heads=1, num_queries=192, num_keys=192, head_dim=64, block_q=64,
    block_kv=64, dtype="bfloat16", mask_names=("random", "empty_rows"),
)  # fmt: skip
_change = functools.partial(dataclasses.replace, _SMALL)
_PAIRED = ("random", "empty_columns")

CASES = {
    # Lists of one and two, a kept block that causality removes, more items than programs.
    "causal_segments_zero": _change(
        causal=True, has_segments=True, pruned_logits="zero", head_dim=32, scale=0.3,
        mask_names=("global_row_and_column",),
    ),
    "every_mask": _change(mask_names=None),
    # More tiles than a ring holds, in every kernel: slots are used again.
    "long_lists": _change(num_queries=320, num_keys=320, head_dim=32, mask_names=("full",)),
    "causal_per_head": _change(
        causal=True, num_heads=2, num_kv_heads=2, mask_heads=2, head_dim=32,
        mask_names=("full", "random"),
    ),
    "shared_ring_key_mask": _change(block_q=128, num_queries=256, has_kv_mask=True, batch=2),
    "wide_keys_causal_zero": _change(
        block_kv=128, num_queries=384, num_keys=384, causal=True, pruned_logits="zero",
        mask_names=("random",),
    ),
    "grouped_shared_mask_causal": _change(
        num_heads=2, causal=True, scale=0.3, mask_names=("full", "random")
    ),
    "grouped_own_masks_causal": _change(num_heads=2, mask_heads=2, causal=True),
    "segments_zero_batch": _change(
        batch=2, mask_batch=2, causal=True, has_segments=True, pruned_logits="zero"
    ),
    "blocks_of_32_zero": _change(
        block_q=32, block_kv=32, num_queries=128, num_keys=128, head_dim=32, pruned_logits="zero",
        mask_names=_PAIRED,
    ),
    "blocks_of_32_grouped_causal": _change(
        block_q=32, block_kv=64, num_queries=128, num_heads=2, mask_heads=2, causal=True,
        mask_names=_PAIRED,
    ),
    "squares_of_128_everything_f16": _change(
        block_q=128, block_kv=128, num_queries=384, num_keys=384, head_dim=128, causal=True,
        has_kv_mask=True, has_segments=True, pruned_logits="zero", dtype="float16",
        mask_names=("random",),
    ),
}  # fmt: skip


# What they are of, the other cases are of, too, in other company.
_SLOW = (
    "shared_ring_key_mask", "causal_per_head", "every_mask", "wide_keys_causal_zero",
    "grouped_own_masks_causal", "segments_zero_batch", "blocks_of_32_zero",
)  # fmt: skip


def _attend(q, k, v, mask, **options):
    return call_implementation("mosaic_sm90")(q, k, v, mask, **options)


@pytest.mark.parametrize("case", tier(CASES, fast=["causal_segments_zero"], slow=_SLOW))
def test_contract(case):
    with hopper():
        check_case(case, _attend)


def test_another_gpu_skips_with_the_reason(monkeypatch):
    def refuse():
        raise NotImplementedError("needs a Hopper GPU")

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(interpreter, "check_hopper", refuse)
    with pytest.raises(pytest.skip.Exception, match="needs a Hopper GPU"), hopper():
        pass


def _wrong_scale(q, k, v, mask, **options):
    return _attend(q, k, v, mask, **options | {"scale": 1.05 * q.shape[-1] ** -0.5})


@pytest.mark.ci
@pytest.mark.parametrize(
    "broken",
    [with_untransposed_lists(_attend), with_a_block_dropped(_attend), _wrong_scale],
    ids=["untransposed lists", "a block dropped", "wrong scale"],
)
def test_contract_rejects_broken_lists_and_scale(broken):
    with pytest.raises(AssertionError, match="off by"), hopper():
        check_case(_change(mask_names=("random",)), broken)


@pytest.mark.ci
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a missing barrier may hang a GPU")
@pytest.mark.parametrize(
    ("missing", "rounds"),
    [(0, 3), (2, 1), (9, 1), (12, 1)],
    ids=["queries_overwritten", "keys_overwritten", "keys_read", "values_read"],
)
def test_contract_rejects_a_missing_barrier(missing, rounds, monkeypatch):
    # In a program with one ring, barriers are awaited in the order: of the copying warpgroup, slots
    # that it uses again, for queries of either warpgroup, keys and values, and the same at the end;
    # of a computing one queries, the first keys, its turn and the next keys in the first step, and
    # values in the others.
    miss_barrier(monkeypatch, missing)
    # Two programs take as many rounds.
    case = _change(block_q=128, num_queries=2 * 128 * rounds, num_keys=640)
    q, k, v = case.inputs()
    mask = jnp.ones((1, 1, 2 * rounds, 10), bool)
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)), hopper():
        jax.block_until_ready(jax.jit(functools.partial(_attend, **case.options))(q, k, v, mask))


@pytest.mark.ci
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU reports no races")
def test_contract_rejects_a_tile_given_back_before_it_is_multiplied(monkeypatch):
    case = CASES["long_lists"]
    (mask,) = case.masks().values()
    run = functools.partial(_attend, **case.options)
    with pytest.raises(AssertionError, match="saw a race"), hopper():
        with monkeypatch.context() as patch:
            give_back_early(patch)
            jax.block_until_ready(jax.jit(run)(*case.inputs(), mask))
        # A sound kernel that runs later must not hide it.
        jax.block_until_ready(jax.jit(lambda *inputs: run(*inputs))(*case.inputs(), mask))


@pytest.mark.ci
def test_nothing_leaks_from_removed_keys():
    case = CASES["shared_ring_key_mask"]
    q, k, v = case.inputs()
    removed = ~case.position_masks()["kv_mask"][:, :, None, None]
    mask = case.masks()["random"]
    run = compile_case(case, _attend)
    leave = compile_case(case, functools.partial(_attend, removed_keys_finite=True))
    with hopper():
        clean = run((q, k, v), mask)
        poisoned = run((q, *(jnp.where(removed, jnp.nan, x) for x in (k, v))), mask)
        left = leave((q, k, v), mask)
        rewrites = [has_select(f, (q, k, v), mask, shape=k.shape) for f in (run, leave)]
    for x, y, z in zip(clean, poisoned, left, strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(x, z)
    assert rewrites == [True, False]


@pytest.mark.ci
def test_a_row_that_counts_nothing_takes_no_gradient_whatever_its_cotangent():
    case = _change(num_queries=64, num_keys=64)
    options = case.options | {"kv_mask": jnp.zeros((1, 64), bool)}
    mask = jnp.ones((1, 1, 1, 1), bool)

    @jax.jit
    def gradients(q, k, v):
        (out, lse), vjp = jax.vjp(lambda *qkv: _attend(*qkv, mask, **options), q, k, v)
        # What comes back along -inf is often not a number.
        return vjp((jnp.ones_like(out), jnp.full_like(lse, jnp.nan)))

    with hopper():
        got = gradients(*case.inputs())
    for x in got:
        np.testing.assert_array_equal(x, jnp.zeros_like(x))


@pytest.mark.ci
def test_repeat_is_bit_equal_and_jit_agrees_with_eager():
    case = _SMALL
    inputs, mask = case.inputs(), case.masks()["random"]
    run = compile_case(case, _attend)
    with hopper():
        first, second = run(inputs, mask), run(inputs, mask)
        eager = _attend(*inputs, mask, **case.options)
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)
    assert max(error(x, y) for x, y in zip(eager, first[:2], strict=True)) < 1e-2


@pytest.mark.ci
def test_vmap_over_inputs_and_masks():
    case = _change(num_queries=64)
    q, k, v = make_normal(tuple((2, *shape) for shape in case.shapes), "bfloat16")
    masks = jnp.array([[[[[True, False, True]]]], [[[[False, True, False]]]]])

    def loss(q, k, v, mask):
        return (_attend(q, k, v, mask, **case.options)[0].astype(jnp.float32) ** 2).sum()

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    with hopper():
        together = jax.jit(jax.vmap(gradient))(q, k, v, masks)
        alone = [jax.jit(gradient)(q[i], k[i], v[i], masks[i]) for i in range(2)]
    for x, *rest in zip(together, *alone, strict=True):
        np.testing.assert_array_equal(x, jnp.stack(rest))


_PROPERTY = _change(block_kv=64, num_queries=128, num_keys=128, causal=True)


@functools.cache
def _property_run(implementation):
    return compile_case(_PROPERTY, call_implementation(implementation))


@pytest.mark.ci
@settings(max_examples=6, deadline=None, derandomize=True)
@given(kept=st.lists(st.booleans(), min_size=4, max_size=4), seed=st.integers(0, 9))
def test_any_mask_agrees_with_the_reference(kept, seed):
    inputs = make_normal(_PROPERTY.shapes, "bfloat16", seed=seed)
    mask = jnp.array(kept).reshape(1, 1, 2, 2)
    with hopper():
        got = _property_run("mosaic_sm90")(inputs, mask)
    exact = _property_run("reference")(tuple(x.astype(jnp.float32) for x in inputs), mask)
    assert max(error(x, y) for x, y in zip(got, exact, strict=True)) < 0.05


@st.composite
def _cases(draw):
    block_q, block_kv = draw(st.sampled_from([32, 64, 128])), draw(st.sampled_from([32, 64, 128]))
    group, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    num_queries = draw(st.integers(1, 3)) * max(block_q, 64)
    segments = draw(st.booleans())
    num_keys = num_queries if segments else draw(st.integers(1, 3)) * max(block_kv, 64)
    assume(num_keys % max(block_kv, 64) == 0)
    batch, num_heads = draw(st.integers(1, 2)), group * kv_heads
    return dataclasses.replace(
        _SMALL, batch=batch, num_heads=num_heads, num_kv_heads=kv_heads, num_queries=num_queries,
        num_keys=num_keys, head_dim=draw(st.sampled_from([32, 64])), block_q=block_q,
        block_kv=block_kv, mask_batch=draw(st.sampled_from([1, batch])),
        mask_heads=draw(st.sampled_from([1, num_heads])), causal=draw(st.booleans()),
        has_kv_mask=draw(st.booleans()), has_segments=segments,
        pruned_logits=draw(st.sampled_from(["masked", "zero"])),
    )  # fmt: skip


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=_cases(), density=st.floats(0, 1), seed=st.integers(0, 99))
def test_any_shape_agrees_with_the_reference(case, density, seed):
    grid = (case.num_queries // case.block_q, case.num_keys // case.block_kv)
    shape = (case.mask_batch, case.mask_heads, *grid)
    mask = jnp.asarray(np.random.default_rng(seed).random(shape) < density)
    with hopper():
        got = compile_case(case, _attend, optimise=False)(case.inputs(), mask)
    inputs = tuple(x.astype(jnp.float32) for x in case.inputs())
    reference = compile_case(case, call_implementation("reference"), optimise=False)
    exact = reference(inputs, mask)
    assert max(error(x, y) for x, y in zip(got, exact, strict=True)) < 0.08, case


_REFUSED = [
    ({"dtype": "float32"}, {}, "bfloat16 and float16, got float32"),
    ({"head_dim": 48}, {}, r"head dims \(32, 64, 128, 256\), got H=48"),
    ({"block_q": 16}, {}, "blocks of .* got block_q=16, block_kv=64"),
    ({"block_q": 32, "num_queries": 96}, {}, "multiples of 64 there, got T=96"),
    ({}, {"scale": -1.0}, "a positive scale, got scale=-1.0"),
    ({"head_dim": 256}, {}, "at head dim 256, two tiles .* do not fit"),
]


@pytest.mark.parametrize(("change", "options", "message"), _REFUSED)
def test_what_the_kernels_do_not_do_is_refused_with_the_reason(change, options, message):
    case = _change(**change)
    q, k, v = case.inputs()
    mask = jnp.ones((1, 1, case.num_queries // case.block_q, case.num_keys // case.block_kv), bool)
    with hopper(), pytest.raises(NotImplementedError, match=message):
        block_sparse_attention(
            q, k, v, mask, **case.options | options, implementation="mosaic_sm90"
        )


@pytest.mark.ci
def test_a_wide_head_runs_forward():
    case = _change(head_dim=256, block_q=128, num_queries=128, num_keys=256)
    inputs, mask = case.inputs(), jnp.array([[[[True, False, True, True]]]])
    with hopper():
        got = jax.jit(functools.partial(_attend, **case.options))(*inputs, mask)
    inputs = (x.astype(jnp.float32) for x in inputs)
    expected = call_implementation("reference")(*inputs, mask, **case.options)
    assert max(error(x, y) for x, y in zip(got, expected, strict=True)) < 0.01


def test_a_wide_head_has_no_gradient_and_says_so():
    case = _change(head_dim=256, block_q=128, block_kv=128, num_queries=128, num_keys=128)
    q, k, v = case.inputs()

    def loss(q):
        out = block_sparse_attention(q, k, v, None, **case.options, implementation="mosaic_sm90")
        return out.astype(jnp.float32).sum()

    with hopper(), pytest.raises(NotImplementedError, match="head dim at most 128, got 256"):
        jax.eval_shape(jax.grad(loss), q)
