"""The contract on every implementation, and on broken ones, which it must reject."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import block_sparse_attention, make_block_schedule
from pallas_kernels.block_lists import Tile
from pallas_kernels.block_sparse_attention.xla import joining
from pallas_kernels.doctor.oracles import error, make_masks, make_normal
from tests.kernels.contract import (
    CASES,
    Case,
    call_implementation,
    check_case,
    compile_case,
    has_select,
    with_a_block_dropped,
    with_untransposed_lists,
)
from tests.kernels.portable_forms import in_cpu_form
from tests.tiers import tier

IMPLEMENTATIONS = ("xla", "dense")
_XLA = call_implementation("xla")


@pytest.mark.parametrize("implementation", ["xla", pytest.param("dense", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "case", tier(CASES, fast=(), slow=["grouped_key_mask_batch", "f16_key_mask", "bf16_causal"])
)
def test_contract(case, implementation):
    check_case(case, call_implementation(implementation))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_contract_as_compiled_in_haste(implementation):
    # The rule for pruned logits and causality meet float64 in `test_float64`.
    case = CASES["bf16_grouped_key_mask_segments"]
    check_case(case, call_implementation(implementation), optimise=False)


@pytest.mark.ci
def test_reference_in_bf16_meets_the_contract():
    check_case(CASES["bf16_causal"], call_implementation("reference"))


@pytest.mark.ci
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_schedule_serves_as_its_mask(implementation):
    attention = call_implementation(implementation)
    check_case(
        CASES["causal_zero_heads"],
        lambda q, k, v, mask, **options: attention(q, k, v, make_block_schedule(mask), **options),
        optimise=False,
    )


def _wrong_scale(q, k, v, mask, **options):
    options["scale"] = 1.01 * q.shape[-1] ** -0.5
    return call_implementation("dense")(q, k, v, mask, **options)


def _value_of_pruned_logits_ignored(q, k, v, mask, **options):
    options["pruned_logits"] = "masked"
    return call_implementation("xla")(q, k, v, mask, **options)


def _causality_ignored(q, k, v, mask, **options):
    options["causal"] = False
    return call_implementation("xla")(q, k, v, mask, **options)


@pytest.mark.parametrize(
    ("case", "broken"),
    [
        pytest.param("plain", with_untransposed_lists(_XLA), marks=pytest.mark.ci),
        pytest.param("plain", with_a_block_dropped(_XLA), marks=pytest.mark.ci),
        ("plain", _wrong_scale),
        pytest.param("bf16_zero", _value_of_pruned_logits_ignored, marks=pytest.mark.ci),
        pytest.param("bf16_causal", _causality_ignored, marks=pytest.mark.ci),
    ],
)
def test_contract_rejects_broken_implementations(case, broken):
    with pytest.raises(AssertionError, match="off by"):
        check_case(CASES[case], broken, optimise=False)


@pytest.mark.ci
@pytest.mark.parametrize("implementation", ["xla", "dense", "reference"])
@pytest.mark.parametrize("pruned_logits", ["masked", "zero"])
def test_nothing_leaks_from_removed_keys(implementation, pruned_logits):
    case = dataclasses.replace(
        CASES["grouped_key_mask_batch"], pruned_logits=pruned_logits, causal=True, num_keys=96
    )
    run = compile_case(case, call_implementation(implementation), optimise=False)
    q, k, v = case.inputs()
    removed = ~case.position_masks()["kv_mask"][:, :, None, None]
    mask = case.masks()["random"]
    clean = run((q, k, v), mask)
    poisoned = run((q, *(jnp.where(removed, jnp.nan, x) for x in (k, v))), mask)
    for x, y in zip(clean, poisoned, strict=True):
        np.testing.assert_array_equal(x, y)
    assert all(not jnp.where(removed, dx, 0).any() for dx in poisoned[3:])


@pytest.mark.ci
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_removed_keys_that_are_finite_are_left_as_they_are(implementation):
    case = dataclasses.replace(CASES["grouped_key_mask_batch"], causal=True)
    attention = call_implementation(implementation)
    mask = case.masks()["random"]
    rewrites, results = [], []
    for finite in (False, True):
        attend = functools.partial(attention, removed_keys_finite=finite)
        run = compile_case(case, attend, optimise=False)
        rewrites.append(has_select(run, case.inputs(), mask, shape=case.shapes[1]))
        results.append(run(case.inputs(), mask))
    assert rewrites == [True, False]
    for x, y in zip(*results, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.ci
def test_repeat_is_bit_equal_and_jit_agrees_with_eager():
    case = CASES["plain"]
    attention = call_implementation("xla")
    run = compile_case(case, attention)
    inputs, mask = case.inputs(), case.masks()["random"]
    first, second = run(inputs, mask), run(inputs, mask)
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)
    eager = attention(*inputs, mask, **case.options)
    assert max(error(x, y) for x, y in zip(eager, first[:2], strict=True)) < 1e-6


@pytest.mark.ci
def test_vmap_over_inputs_and_schedules():
    case = Case(num_queries=64, num_keys=64)
    q, k, v = make_normal(tuple((3, *shape) for shape in case.shapes))
    masks = jnp.stack(list(make_masks((1, 1, 4, 4)).values())[:3])

    def attend(q, k, v, schedule):
        return block_sparse_attention(q, k, v, schedule, **case.options, implementation="xla")

    def loss(q, k, v, schedule):
        return (attend(q, k, v, schedule) ** 2).sum()

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    together = jax.jit(jax.vmap(gradient))(q, k, v, make_block_schedule(masks))
    single = jax.jit(gradient)
    for index in range(3):
        alone = single(q[index], k[index], v[index], make_block_schedule(masks[index]))
        for x, y in zip(together, alone, strict=True):
            assert error(x[index], y) < 1e-5


@pytest.mark.ci
def test_layers_scan_over_stacked_schedules_with_remat():
    case = Case(num_queries=64, num_keys=64, causal=True)
    (x,) = make_normal((case.shapes[0],))
    masks = jnp.stack([case.masks()[name] for name in ("random", "full", "empty_rows")])

    def loss(x, masks, implementation):
        @jax.checkpoint
        def layer(x, schedule):
            y = block_sparse_attention(
                x, x, x, schedule, **case.options, implementation=implementation
            )
            return x + y, None

        return (jax.lax.scan(layer, x, make_block_schedule(masks))[0] ** 2).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=2)
    assert error(gradient(x, masks, "xla"), gradient(x, masks, "reference")) < 1e-3


_PROPERTY_CASE = Case(num_queries=64, num_keys=80, mask_heads=4, num_kv_heads=2)
_PROPERTY_RUNS = {}


@pytest.mark.ci
@settings(max_examples=15, deadline=None, derandomize=True)
@given(density=st.floats(0, 1), seed=st.integers(0, 99))
def test_any_mask_agrees_with_the_reference(density, seed):
    for name in ("xla", "reference"):
        if name not in _PROPERTY_RUNS:
            _PROPERTY_RUNS[name] = compile_case(
                _PROPERTY_CASE, call_implementation(name), optimise=False
            )
    mask = jnp.asarray(np.random.default_rng(seed).random((1, 4, 4, 5)) < density)
    results = [run(_PROPERTY_CASE.inputs(), mask) for run in _PROPERTY_RUNS.values()]
    for actual, expected in zip(*results, strict=True):
        assert error(actual, expected) < 1e-5


_BAND = np.tri(32, k=1, dtype=bool) & ~np.tri(32, k=-2, dtype=bool)
_GLOBAL = np.arange(32) == 0
_WORK_MASKS = {
    "none": np.zeros((32, 32), bool),
    "band": _BAND,
    "global row and column": _BAND | _GLOBAL | _GLOBAL[:, None],
    "full": np.ones((32, 32), bool),
}


@pytest.mark.ci
@pytest.mark.parametrize("causal", [False, True])
def test_work_is_proportional_to_kept_blocks(monkeypatch, causal):
    computed = []
    walk = Tile.walk

    def counting_walk(tile, step, block):
        visited, listed = walk(tile, step, block)
        jax.debug.callback(lambda size: computed.append(int(size)), visited.size)
        return visited, listed

    monkeypatch.setattr(Tile, "walk", counting_walk)
    # No block is joined to others, whatever the mask keeps.
    monkeypatch.setattr(joining, "_FEWEST", 4096)
    q, k, v = make_normal(((1, 2048, 1, 8),) * 3)

    @jax.jit
    def gradient(mask):
        @in_cpu_form
        def loss(q, k, v):
            options = {"block_q": 64, "block_kv": 64, "causal": causal, "implementation": "xla"}
            return block_sparse_attention(q, k, v, mask[None, None], **options).sum()

        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    for name, mask in _WORK_MASKS.items():
        computed.clear()
        jax.block_until_ready(gradient(jnp.asarray(mask)))
        jax.effects_barrier()
        kept = np.tril(mask) if causal else mask
        longest = max(kept.sum(axis=0).max(), kept.sum(axis=1).max())
        # Forward and backward, each list rounded up to pairs, one tile of eight padded to its
        # longest list.
        bound = 2 * (kept.sum() + 32 + 8 * longest)
        assert 2 * kept.sum() <= sum(computed) <= bound, f"{name}: {sum(computed)} > {bound}"


@pytest.mark.ci
def test_temporary_memory_grows_with_the_length():
    def temporary_bytes(length):
        array = jax.ShapeDtypeStruct((1, length, 4, 64), jnp.float32)
        mask = jax.ShapeDtypeStruct((1, 1, length // 64, length // 64), bool)

        def loss(q, k, v, mask):
            return block_sparse_attention(
                q, k, v, mask, block_q=64, block_kv=64, implementation="xla"
            ).sum()

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        with jax.default_device(jax.devices("cpu")[0]):
            compiled = gradient.lower(array, array, array, mask).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(4096), temporary_bytes(8192)
    operand_bytes = 4096 * 4 * 64 * 4
    assert long < 2.2 * short
    assert short < 10 * operand_bytes
