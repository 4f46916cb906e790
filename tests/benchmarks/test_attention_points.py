"""What an attention point compares, and with what inputs and references, on CPU and GPU."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import attention
from benchmarks.attention import count_input_sets, make_case, make_gpu_case
from benchmarks.attention_problems import (
    Problem,
    headline_problems,
    make_pattern,
    sweep_problems,
)
from benchmarks.attention_torch import FLEX, SDPA, list_flex_blocks
from benchmarks.harness import RESULTS, measure_case
from pallas_kernels import make_block_schedule
from pallas_kernels.doctor.timing import relative_error

SMALL = Problem(length=256, heads=1, head_dim=32, dtype="bfloat16", density=0.4)
QUICK = {"repeats": 3, "sample_seconds": 0.0}


def test_keys_of_recorded_cpu_points_have_not_changed():
    recorded = json.loads((RESULTS / "attention.json").read_text())["points"]
    on_cpu = [r["key"] for r in recorded if "cores" in r["key"]["device"]]
    kept = [{n: v for n, v in key.items() if n != "device"} for key in on_cpu]
    expected = [problem.key() for problem in headline_problems("cpu")]
    assert all(key in kept for key in expected)


def test_a_key_says_what_is_measured_only_where_it_is_not_attention():
    assert "measure" not in SMALL.key()
    schedule = dataclasses.replace(SMALL, measure="schedule")
    assert schedule.key() == {**SMALL.key(), "measure": "schedule"}


def test_gpu_points_fill_the_gpu_and_are_all_different():
    headline, sweep = headline_problems("gpu"), sweep_problems("gpu")
    assert 20 <= len(headline) <= 30 and sweep[: len(headline)] == headline
    assert len({json.dumps(p.key()) for p in sweep}) == len(sweep)
    for problem in sweep:
        assert problem.heads * problem.head_dim == 2048
        assert problem.batch * problem.length == max(16384, problem.length)
        assert problem.dtype == "bfloat16"
    assert {p.density for p in sweep} >= {0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0}
    assert {p.measure for p in headline} == {"attention", "schedule"}


def test_union_points_keep_the_same_area():
    pair = [p for p in headline_problems("gpu") if p.pattern == "union"]
    assert sorted(p.block for p in pair) == [32, 64]
    assert pair[0].kept_share() == pair[1].kept_share() == 0.125


@pytest.mark.parametrize("name", ["sliding_window", "strided", "spion", "union"])
@pytest.mark.parametrize("causal", [False, True])
def test_patterns_come_near_their_density(name, causal):
    kept = make_pattern(name, 64, density=0.2, causal=causal)
    visible = 64 * 65 / 2 if causal else 64**2
    assert kept.sum() / visible == pytest.approx(0.2, rel=0.25)
    assert not (causal and np.triu(kept, 1).any())
    np.testing.assert_array_equal(kept, make_pattern(name, 64, density=0.2, causal=causal))


def test_strided_is_local_or_strided_and_spion_is_uneven():
    strided = make_pattern("strided", 32, density=0.25, causal=False)
    assert strided[16].nonzero()[0].tolist() == [0, 8, 15, 16, 17, 24]
    rows = make_pattern("spion", 64, density=0.1, causal=False).sum(axis=1)
    assert rows.max() == 64 and np.median(rows) < 8


def test_an_unknown_pattern_is_refused():
    with pytest.raises(ValueError, match="strided, spion or full, got 'stripes'"):
        Problem(length=256, pattern="stripes").make_mask()


def test_work_is_counted_over_kept_blocks():
    full = Problem(length=256, pattern="full", backward=False)
    assert full.flops() == 4 * 4 * 256**2 * 64
    assert dataclasses.replace(full, backward=True).flops() == 3.5 * full.flops()
    half = dataclasses.replace(full, causal=True)
    assert half.flops() == full.flops() * 10 / 16


@pytest.mark.parametrize("size, sets", [(200, 1), (128, 1), (100, 2), (33, 4), (1, 8)])
def test_small_operands_come_in_several_sets(size, sets):
    assert count_input_sets(size * 10**6) == sets


@pytest.mark.ci
def test_a_cpu_point_compares_what_it_always_did():
    case = make_case(Problem(length=256, heads=1, head_dim=32))
    assert list(case.functions) == ["xla", "hand-written", "jax.nn"]
    assert not case.more_args and {FLEX, SDPA} == case.foreign.keys() | case.absent.keys()
    values = measure_case(case, **QUICK)
    assert all("median_seconds" in values[name] for name in case.functions)


def make_hopper_case(problem):
    return make_gpu_case(problem, compute_capability="9.0")


@pytest.mark.ci
def test_a_hopper_point_holds_the_kernel_and_its_peers():
    case = make_hopper_case(SMALL)
    assert set(case.functions) == {"xla", "jax.nn", "mosaic_sm90", "cudnn"}
    assert {*case.foreign, *case.absent} == {FLEX, SDPA, "triton"}
    assert len(case.more_args) == 7
    assert not jnp.array_equal(case.args[0], case.more_args[0][0])
    assert all(bool((x != 0).any()) for x in case.args[:4])


def test_a_point_of_another_gpu_or_type_says_why_it_lacks_the_kernel():
    assert "found 8.0" in make_gpu_case(SMALL, compute_capability="8.0").absent["mosaic_sm90"]
    wide = make_hopper_case(dataclasses.replace(SMALL, dtype="float32"))
    assert set(wide.functions) == {"xla", "jax.nn"}


@pytest.mark.ci
def test_triton_is_measured_where_it_runs(monkeypatch):
    monkeypatch.setattr(attention, "find_triton_refusal", lambda: None)
    case = make_gpu_case(SMALL, compute_capability="8.0")
    assert {"triton", "cudnn"} <= set(case.functions) and "triton" not in case.absent
    assert case.flops["triton"] == SMALL.flops()


@pytest.mark.ci
@pytest.mark.parametrize("causal", [False, True])
def test_cudnn_is_held_against_dense_attention_without_the_mask(causal):
    problem = dataclasses.replace(SMALL, causal=causal, backward=False)
    case = make_hopper_case(problem)
    unmasked = jax.nn.dot_product_attention(*case.args[:3], is_causal=causal)
    for name in ("cudnn", SDPA):
        assert relative_error(case.references[name](*case.args), unmasked) < 1e-3
    assert relative_error(case.reference(*case.args), unmasked) > 0.1
    full = dataclasses.replace(problem, pattern="full")
    assert case.flops["cudnn"] == case.flops[SDPA] == full.flops()
    assert case.flops["mosaic_sm90"] == case.flops[FLEX] == problem.flops()


@pytest.mark.ci
def test_a_schedule_point_times_the_schedule_beside_its_attention():
    case = make_hopper_case(dataclasses.replace(SMALL, measure="schedule"))
    assert list(case.functions) == ["mosaic_sm90", "schedule"]
    made, listed = case.functions["schedule"](*case.args), case.references["schedule"](*case.args)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), made, listed))
    elsewhere = make_gpu_case(
        dataclasses.replace(SMALL, measure="schedule"), compute_capability="8.0"
    )
    assert list(elsewhere.functions) == ["xla", "schedule"]


@pytest.mark.ci
def test_attention_too_long_for_dense_peers_is_checked_against_xla(monkeypatch):
    monkeypatch.setitem(attention.MAX_LOGITS_BYTES, "gpu", 4 * 256**2 - 1)
    case = make_hopper_case(SMALL)
    assert case.absent["jax.nn"] == "its logits do not fit the machine"
    xla = case.functions["xla"](*case.args)
    assert relative_error(case.reference(*case.args), xla) == 0.0


def unpack(counts, indices):
    kept = np.zeros(indices.shape, bool)
    for at in np.ndindex(counts.shape):
        listed = indices[at][: counts[at]]
        assert listed.tolist() == sorted(listed)
        kept[at][listed] = True
    return kept


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_flex_lists_hold_the_mask_split_at_the_diagonal(heads, causal):
    mask = np.random.default_rng(1).random((2, heads, 6, 6)) < 0.5
    lists = list_flex_blocks(mask, causal=causal)
    assert all(x.dtype == np.int32 and x.shape[:3] == (2, heads, 6) for x in lists.values())
    by_row = {p: unpack(lists[p + "kv_num_blocks"], lists[p + "kv_indices"]) for p in ("", "full_")}
    for prefix, kept in by_row.items():
        by_column = unpack(lists[prefix + "q_num_blocks"], lists[prefix + "q_indices"])
        np.testing.assert_array_equal(by_column.swapaxes(-1, -2), kept)
    diagonal = np.eye(6, dtype=bool)
    np.testing.assert_array_equal(by_row[""], mask & diagonal if causal else np.zeros_like(mask))
    np.testing.assert_array_equal(by_row["full_"], np.tril(mask, -1) if causal else mask)


def test_flex_lists_of_dense_attention_are_those_of_our_schedule():
    mask = make_pattern("spion", 16, density=0.2, causal=False)[None, None]
    lists, schedule = list_flex_blocks(mask, causal=False), make_block_schedule(jnp.asarray(mask))
    np.testing.assert_array_equal(lists["full_kv_indices"], schedule.kv_indices)
    np.testing.assert_array_equal(lists["full_q_indices"], schedule.q_indices)
