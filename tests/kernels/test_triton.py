"""The Triton attention kernels against the contract: interpreted, or on a GPU if there is one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import block_sparse_attention
from pallas_kernels.doctor.oracles import error, make_normal
from tests.kernels.contract import (
    Case,
    call_implementation,
    check_case,
    compile_case,
    with_a_block_dropped,
    with_untransposed_lists,
)
from tests.kernels.triton_interpreter import triton_kernels
from tests.tiers import tier

_SMALL = Case(
    batch=1, num_heads=2, num_kv_heads=1, num_queries=96, num_keys=96, head_dim=16, block_q=32,
    block_kv=32, mask_names=("random",),
)  # fmt: skip
_change = functools.partial(dataclasses.replace, _SMALL)

CASES = {
    "causal_per_head_zero_bf16": _change(
        causal=True, mask_heads=2, pruned_logits="zero", dtype="bfloat16"
    ),
    "every_mask": _change(mask_names=None),
    "causal_every_mask": _change(causal=True, mask_names=None, scale=-0.3),
    "padded_head_everything": _change(
        batch=2, mask_batch=2, mask_heads=4, num_heads=4, num_kv_heads=2, head_dim=48,
        has_kv_mask=True, has_segments=True, causal=True, pruned_logits="zero",
        mask_names=("random", "empty_rows"),
    ),
    "key_mask_batch_f16": _change(batch=2, mask_batch=2, has_kv_mask=True, dtype="float16"),
    "segments_zero_bf16": _change(
        batch=2, has_segments=True, pruned_logits="zero", dtype="bfloat16", num_kv_heads=2
    ),
    "blocks_in_tiles_causal_bf16": _change(
        num_queries=256, num_keys=256, block_q=128, block_kv=128, head_dim=64, causal=True,
        dtype="bfloat16", mask_names=("full", "random"),
    ),
    "small_blocks_causal": _change(block_q=16, block_kv=16, causal=True),
    "wide_keys_causal": _change(block_q=16, block_kv=128, num_keys=256, causal=True),
    "wide_queries_causal_zero": _change(
        block_q=128, block_kv=16, num_queries=256, causal=True, pruned_logits="zero"
    ),
    "long_keys_key_mask": _change(num_keys=192, block_kv=64, causal=True, has_kv_mask=True),
    "wide_head_bf16": _change(head_dim=256, num_queries=64, num_keys=64, dtype="bfloat16"),
    "padded_wide_head_f32": _change(head_dim=80, num_queries=64, num_keys=64, causal=True),
}  # fmt: skip


def _attend(q, k, v, mask, **options):
    return call_implementation("triton")(q, k, v, mask, **options)


@pytest.mark.parametrize(
    "case",
    tier(
        CASES,
        fast=["causal_per_head_zero_bf16"],
        slow=[
            "every_mask",
            "key_mask_batch_f16",
            "segments_zero_bf16",
            "wide_head_bf16",
            "wide_queries_causal_zero",
        ],
    ),
)
def test_contract(case):
    with triton_kernels():
        check_case(case, _attend)


@pytest.mark.ci
@pytest.mark.parametrize("broken", [with_untransposed_lists, with_a_block_dropped])
def test_contract_rejects_broken_lists(broken):
    with pytest.raises(AssertionError, match="off by"), triton_kernels():
        check_case(_SMALL, broken(_attend))


@pytest.mark.ci
def test_nothing_leaks_from_removed_keys():
    case = CASES["long_keys_key_mask"]
    q, k, v = case.inputs()
    removed = ~case.position_masks()["kv_mask"][:, :, None, None]
    mask = case.masks()["random"]
    run = compile_case(case, _attend)
    leave = compile_case(case, functools.partial(_attend, removed_keys_finite=True))
    with triton_kernels():
        clean = run((q, k, v), mask)
        poisoned = run((q, *(jnp.where(removed, jnp.nan, x) for x in (k, v))), mask)
        left = leave((q, k, v), mask)
    for x, y, z in zip(clean, poisoned, left, strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(x, z)


@pytest.mark.ci
def test_a_row_that_counts_nothing_takes_no_gradient_whatever_its_cotangent():
    case = _change(num_queries=32, num_keys=32)
    options = case.options | {"kv_mask": jnp.zeros((1, 32), bool)}
    mask = jnp.ones((1, 1, 1, 1), bool)

    @jax.jit
    def gradients(q, k, v):
        (out, lse), vjp = jax.vjp(lambda *qkv: _attend(*qkv, mask, **options), q, k, v)
        # What comes back along -inf is often not a number.
        return vjp((jnp.ones_like(out), jnp.full_like(lse, jnp.nan)))

    with triton_kernels():
        got = gradients(*case.inputs())
    for x in got:
        np.testing.assert_array_equal(x, jnp.zeros_like(x))


@pytest.mark.ci
def test_repeat_is_bit_equal_and_jit_agrees_with_eager():
    inputs, mask = _SMALL.inputs(), _SMALL.masks()["random"]
    run = compile_case(_SMALL, _attend)
    with triton_kernels():
        first, second = run(inputs, mask), run(inputs, mask)
        eager = _attend(*inputs, mask, **_SMALL.options)
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)
    assert max(error(x, y) for x, y in zip(eager, first[:2], strict=True)) < 1e-6


def _loss(q, k, v, mask):
    return (_attend(q, k, v, mask, **_SMALL.options)[0] ** 2).sum()


@pytest.mark.ci
@pytest.mark.parametrize("axes", [(0, 0, 0, None), (0, None, 0, 0), (None, 0, 0, 0)])
def test_vmap_folds_the_axis_into_the_batch(axes):
    shapes = [
        shape if axis is None else (2, *shape)
        for axis, shape in zip(axes[:3], _SMALL.shapes, strict=True)
    ]
    q, k, v = make_normal(tuple(shapes), "float32")
    mask = jnp.tril(jnp.ones((1, 1, 3, 3), bool))
    masks = mask if axes[3] is None else jnp.stack([mask, ~mask])
    gradient = jax.grad(_loss, argnums=(0, 1, 2))
    with triton_kernels():
        together = jax.jit(jax.vmap(gradient, in_axes=axes))(q, k, v, masks)
        alone = [
            jax.jit(gradient)(
                *(x if a is None else x[i] for a, x in zip(axes, (q, k, v, masks), strict=True))
            )
            for i in range(2)
        ]
    # What XLA computes beside the kernels may be rounded otherwise.
    for x, *rest in zip(together, *alone, strict=True):
        assert error(x, jnp.stack(rest)) < 1e-5


@pytest.mark.ci
def test_scan_and_checkpoint():
    (q, k, v), mask = _SMALL.inputs(), _SMALL.masks()["random"]

    def loss(q, attend):
        def step(q, _):
            return q + attend(q, k, v, mask), None

        return (jax.lax.scan(step, q, None, length=2)[0] ** 2).sum()

    def attend(implementation):
        call = functools.partial(block_sparse_attention, implementation=implementation)
        return lambda *arrays: call(*arrays, block_q=32, block_kv=32)

    with triton_kernels():
        got = jax.jit(jax.grad(lambda q: loss(q, jax.checkpoint(attend("triton")))))(q)
    expected = jax.grad(lambda q: loss(q, attend("reference")))(q)
    assert error(got, expected) < 1e-4


@st.composite
def _cases(draw):
    block_q, block_kv = (draw(st.sampled_from([16, 32, 64, 128])) for _ in range(2))
    group, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    num_queries = draw(st.integers(1, 2)) * max(block_q, block_kv)
    segments = draw(st.booleans())
    num_keys = num_queries if segments else draw(st.integers(1, 3)) * block_kv
    batch, num_heads = draw(st.integers(1, 2)), group * kv_heads
    return dataclasses.replace(
        _SMALL, batch=batch, num_heads=num_heads, num_kv_heads=kv_heads, num_queries=num_queries,
        num_keys=num_keys, head_dim=draw(st.sampled_from([16, 40, 64])), block_q=block_q,
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
    with triton_kernels():
        got = compile_case(case, _attend, optimise=False)(case.inputs(), mask)
    reference = compile_case(case, call_implementation("reference"), optimise=False)
    exact = reference(case.inputs(), mask)
    assert max(error(x, y) for x, y in zip(got, exact, strict=True)) < 1e-4, case


_REFUSED = [
    ({"head_dim": 8}, "head dims from 16 to 256, got H=8"),
    ({"head_dim": 272}, "head dims from 16 to 256, got H=272"),
    ({"head_dim": 144}, "float32 with head dims up to 128"),
    ({"block_q": 8}, r"blocks of \(16, 32, 64, 128\) positions, got block_q=8, block_kv=32"),
    ({"block_kv": 48}, "got block_q=32, block_kv=48"),
]


@pytest.mark.parametrize(("change", "message"), _REFUSED)
def test_what_the_kernels_do_not_do_is_refused_with_the_reason(change, message):
    case = _change(**change)
    grid = (case.num_queries // case.block_q, case.num_keys // case.block_kv)
    with triton_kernels(), pytest.raises(NotImplementedError, match=message):
        call_implementation("triton")(*case.inputs(), jnp.ones((1, 1, *grid), bool), **case.options)


def test_an_example_that_32_bits_cannot_count_is_refused():
    q = jax.ShapeDtypeStruct((1, 2**18, 64, 128), jnp.bfloat16)
    attend = functools.partial(
        block_sparse_attention, block_q=128, block_kv=128, implementation="triton"
    )
    with triton_kernels(), pytest.raises(NotImplementedError, match="262144 x 64 x 128 of queries"):
        jax.eval_shape(lambda q: attend(q, q, q, None), q)
