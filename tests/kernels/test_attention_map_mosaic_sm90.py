"""The mean softmax map of the Hopper kernel: interpreted, or on a GPU where there is one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.contract import has_select
from tests.kernels.interpreter import free_in_own_program, hopper, miss_barrier
from tests.kernels.map_contract import BROKEN, Case, check, make_map
from tests.tiers import tier

CASES = {
    # Six steps in each of six tiles: the slots of the ring are used again.
    "rectangle_of_tiles": Case(batch=2, heads=(3, 3), lengths=(256, 384)),
    "causal_grouped_f16": Case(
        heads=(4, 2), lengths=(256, 256), head_dim=32, causal=True, dtype="float16"
    ),
    "grouped_causal_key_mask": Case(heads=(4, 2), head_dim=32, causal=True, has_kv_mask=True),
    "causal_key_mask": Case(batch=2, lengths=(256, 256), causal=True, has_kv_mask=True),
    "more_keys_than_queries_wide_head": Case(lengths=(128, 256), causal=True, head_dim=128),
    # A head takes two of three slots: they are used again in another order.
    "widest_head": Case(heads=(2, 1), head_dim=256, has_kv_mask=True),
    "widest_head_cluster": Case(heads=(3, 1), lengths=(256, 128), head_dim=256),
    # Two programs share keys and their mask. The first tile of the second pair is above the
    # diagonal, and goes along.
    "cluster_key_mask": Case(
        heads=(4, 2), lengths=(256, 256), head_dim=32, causal=True, has_kv_mask=True
    ),
    # Tiles of queries are odd, and no program has a second one.
    "three_tiles_of_queries": Case(lengths=(384, 128), head_dim=32),
    "one_head": Case(lengths=(256, 128), head_dim=32),
    # What lies above the diagonal is exp of hundreds before it is dropped.
    "loud_causal": Case(causal=True, loudness=100.0),
    "own_lse": Case(batch=2, heads=(2, 1), causal=True, has_kv_mask=True, own_lse=True),
}


_mean_map = make_map("mosaic_sm90")


@pytest.mark.parametrize(
    "case",
    tier(
        CASES,
        fast=["grouped_causal_key_mask", "cluster_key_mask"],
        slow=["causal_key_mask", "rectangle_of_tiles"],
    ),
)
def test_the_mean_map(case):
    with hopper():
        check(case, _mean_map)


@pytest.mark.ci
def test_keys_are_not_rewritten_to_find_lse_and_removed_ones_have_no_effect():
    case = dataclasses.replace(CASES["own_lse"], batch=1)
    q, k, _ = case.inputs()
    run = jax.jit(functools.partial(_mean_map, causal=case.causal, kv_mask_BS=case.kv_mask()))
    assert jnp.isnan(k).any()
    with hopper():
        poisoned, clean = run(q, k), run(q, jnp.nan_to_num(k))
        assert not has_select(run, q, k, shape=k.shape)
    np.testing.assert_array_equal(poisoned, clean)


@pytest.mark.parametrize("broken", tier(BROKEN, fast=["_with_heads_of_another_group"]))
def test_a_broken_mean_is_noticed(broken):
    with pytest.raises(AssertionError, match="off by"), hopper():
        check(CASES["grouped_causal_key_mask"], functools.partial(broken, _mean_map))


@pytest.mark.ci
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a missing barrier may hang a GPU")
@pytest.mark.parametrize(
    "missing", [0, 2, 3], ids=["slot_reused", "first_tile_read", "next_tile_read"]
)
def test_a_missing_barrier_is_noticed(missing, monkeypatch):
    # Barriers are awaited in the order: two of the copying warpgroup, two of a computing one.
    miss_barrier(monkeypatch, missing)
    q, k, lse = Case(batch=3, heads=(2, 2), head_dim=32).inputs()
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)), hopper():
        jax.block_until_ready(jax.jit(_mean_map)(q, k, lse=lse))


@pytest.mark.ci
@pytest.mark.parametrize("copies", ["late", "random"])
@pytest.mark.parametrize("name", ["cluster_key_mask", "widest_head_cluster"])
def test_the_mean_map_whenever_copies_land(name, copies):
    with hopper(copies, seed=1):
        check(CASES[name], _mean_map)


@pytest.mark.ci
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a race may hang a GPU")
def test_a_slot_that_is_free_in_one_program_of_a_cluster_is_not_free(monkeypatch):
    free_in_own_program(monkeypatch)
    q, k, lse = Case(batch=3, heads=(2, 2), lengths=(256, 128), head_dim=32).inputs()
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)), hopper():
        jax.block_until_ready(jax.jit(_mean_map)(q, k, lse=lse))


@pytest.mark.ci
@pytest.mark.parametrize("num_queries", [128, 256])
def test_a_repeated_call_agrees_to_the_bit_and_lse_of_minus_infinity_adds_nothing(num_queries):
    q, k, lse = Case(heads=(4, 2), lengths=(num_queries, 128), head_dim=32).inputs()
    nothing = lse.at[:, 5].set(-jnp.inf)
    run = jax.jit(_mean_map)
    with hopper():
        first, second, emptied = (run(q, k, lse=x) for x in (lse, lse, nothing))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(emptied, first.at[5].set(0.0))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(dtype="float32"), "takes bfloat16 and float16, got float32"),
        (Case(head_dim=48), r"takes head dims \(32, 64, 128, 256\), got H=48"),
        (Case(lengths=(192, 128)), "lengths that are multiples of 128, got T=192, S=128"),
        (Case(lengths=(128, 100)), "lengths that are multiples of 128, got T=128, S=100"),
    ],
)
def test_what_the_kernel_does_not_do_is_refused_with_the_reason(case, message):
    q, k, _ = dataclasses.replace(case, own_lse=True).inputs()
    lse = jnp.zeros(q.shape[:3])
    with hopper(), pytest.raises(NotImplementedError, match=message):
        _mean_map(q, k, lse=lse)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a Hopper GPU may be there")
def test_without_a_hopper_gpu_the_kernel_is_refused():
    q, k, lse = Case(own_lse=True).inputs()
    with pytest.raises(NotImplementedError, match="needs a Hopper GPU"):
        _mean_map(q, k, lse=lse)
