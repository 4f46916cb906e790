"""What a point of the benchmark of N:M products compares, and with what inputs and references."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import nm_matmul
from benchmarks.compiled_kernels import find_block_bytes, list_targets
from benchmarks.harness import RESULTS, measure_case
from benchmarks.nm_matmul import choose_kernels, make_case
from benchmarks.nm_matmul_functions import (
    fit_dense,
    make_error,
    make_sparse,
    on_every_set,
    share_of_different_bits,
)
from benchmarks.nm_matmul_problems import (
    BLOCKS,
    Problem,
    headline_problems,
    make_inputs,
    make_transposable_mask,
    sweep_problems,
)
from benchmarks.nm_matmul_tiles import (
    Product,
    list_candidates,
    list_products,
    make_product_inputs,
    name_tiles,
    read_tiles,
)
from benchmarks.nm_matmul_torch import CUSPARSELT
from pallas_kernels import aot, check_nm_mask, unpack_nm
from pallas_kernels.hopper.budget import SHARED_MEMORY_BYTES
from pallas_kernels.nm_matmul.mosaic_sm90.cut import count_shared_bytes
from pallas_kernels.nm_matmul.triton import tiles as triton_tiles

QUICK = {"repeats": 3, "sample_seconds": 0.0}
GEMM = Problem(measure="gemm", rows=64, inner=64, columns=128)
FFN = Problem(measure="ffn", rows=64, inner=64, columns=128, activation="swiglu")


@functools.cache
def inputs_of(problem):
    return jax.jit(functools.partial(make_inputs, problem, 0, packs=True))()


def test_keys_of_recorded_cpu_points_have_not_changed():
    recorded = json.loads((RESULTS / "nm_matmul.json").read_text())["points"]
    keys = [{n: v for n, v in r["key"].items() if n != "device"} for r in recorded]
    assert all(problem.key() in keys for problem in headline_problems("cpu"))
    assert all("failed" not in value for r in recorded for value in r["values"].values())


def test_gpu_points_are_those_of_the_targets_and_all_different():
    headline, sweep = headline_problems("gpu"), sweep_problems("gpu")
    assert 14 <= len(headline) <= 17 and sweep[: len(headline)] == headline
    assert len({json.dumps(p.key()) for p in sweep}) == len(sweep)
    sizes = {p.rows for p in sweep if p.measure == "gemm" and p.rows == p.inner == p.columns}
    assert sizes >= {1024, 2048, 4096, 8192, 16384}
    measured = {(p.inner, p.columns) for p in headline if p.measure == "ffn"}
    assert measured == {(block.width, block.hidden) for block in BLOCKS}
    assert {p.measure for p in headline} == {"gemm", "gemm_with_packing", "dx", "dw", "pack", "ffn"}
    # What the kernel takes, with nothing to pad.
    assert all(p.inner % 64 == p.columns % 64 == 0 for p in sweep)


def test_work_is_counted_dense():
    assert GEMM.flops() == 2 * 64 * 64 * 128
    assert FFN.flops() == 3 * (GEMM.flops() * 2 + GEMM.flops())
    assert dataclasses.replace(FFN, activation="gelu").flops() == 6 * GEMM.flops()
    pack = Problem(measure="pack", rows=1, inner=4096, columns=4096)
    assert pack.flops() is None and pack.packing_bytes() == 88_080_384


@pytest.mark.parametrize("size, sets", [(1024, 21), (2048, 6), (4096, 2), (8192, 1)])
def test_operands_that_fit_the_cache_come_in_several_sets(size, sets):
    assert dataclasses.replace(GEMM, rows=size, inner=size, columns=size).count_sets() == sets


@pytest.mark.ci
def test_masks_are_transposable_and_take_every_form():
    mask = np.asarray(make_transposable_mask(jax.random.key(0), 256, 128))
    for axis in (0, 1):
        check_nm_mask(mask, axis=axis)
    assert mask.mean() == 0.5
    blocks = mask.reshape(64, 4, 32, 4).transpose(0, 2, 1, 3).reshape(-1, 16)
    assert len(np.unique(blocks, axis=0)) == 90


@pytest.mark.ci
def test_inputs_are_random_and_packed_only_for_what_takes_it():
    s = inputs_of(GEMM)
    assert bool((s.x != 0).mean() > 0.99) and s.d_out is None and s.key is None
    assert bool((unpack_nm(s.packed) == jnp.where(s.mask, s.w, 0)).all())
    assert s.packed.along_n is None
    assert inputs_of(dataclasses.replace(GEMM, measure="dx")).packed.along_n is not None
    ffn = inputs_of(dataclasses.replace(FFN, grad_pruning="mvue"))
    assert ffn.packed is None and ffn.key is not None
    assert ffn.w.shape == (64, 256) and ffn.w_down.shape == (128, 64)
    other = make_inputs(GEMM, 1, packs=False)
    assert other.packed is None and not jnp.array_equal(other.x, s.x)


@pytest.mark.ci
@pytest.mark.parametrize(
    "problem",
    [
        GEMM,
        dataclasses.replace(GEMM, measure="gemm_with_packing"),
        dataclasses.replace(GEMM, measure="dx", dtype="float32"),
        dataclasses.replace(GEMM, measure="dw", grad_pruning="mvue"),
        dataclasses.replace(FFN, grad_pruning="mvue"),
        dataclasses.replace(FFN, activation="gelu", dtype="float32"),
        dataclasses.replace(GEMM, measure="pack"),
    ],
    ids=lambda p: f"{p.measure}-{p.dtype}",
)
def test_every_measure_runs_and_agrees_on_a_cpu(problem):
    case = make_case(problem, kernels=("xla",), on_cpu=True)
    values = measure_case(case, **QUICK)
    assert set(values) == ({"xla"} if problem.measure == "pack" else {"xla", "dense"})
    assert all("median_seconds" in value for value in values.values()), values


@pytest.mark.ci
def test_one_call_works_on_every_set_and_times_are_those_of_one(monkeypatch):
    monkeypatch.setattr(Problem, "count_sets", lambda self: 3)
    case = make_case(GEMM, kernels=("xla",), on_cpu=False)
    assert case.units == len(case.args) == 3
    results = case.functions["xla"](*case.args)
    assert len(results) == 3 and not jnp.array_equal(results[0], results[1])
    assert {*case.foreign, *case.absent} == {CUSPARSELT}
    values = measure_case(case, **QUICK)["xla"]
    assert values["tflops_per_second"] == GEMM.flops() / values["median_seconds"] / 1e12


@pytest.mark.parametrize(
    ("capability", "refusal", "kernels", "absent"),
    [
        ("9.0", None, ("mosaic_sm90", "triton"), set()),
        ("9.0", "no Triton", ("mosaic_sm90",), {"triton"}),
        ("8.0", None, ("triton",), {"mosaic_sm90"}),
        ("12.0", None, ("triton",), {"mosaic_sm90"}),
        ("7.5", "too old", ("xla",), {"mosaic_sm90", "triton"}),
    ],
)
def test_each_device_is_measured_with_the_kernels_that_it_has(
    capability, refusal, kernels, absent, monkeypatch
):
    class Device:
        platform, compute_capability = "gpu", capability

    monkeypatch.setattr(nm_matmul, "find_triton_refusal", lambda: refusal)
    chosen, reasons = choose_kernels(Device())
    assert chosen == kernels and set(reasons) == absent
    assert reasons.get("triton", refusal) == refusal
    assert f"found {capability}" in reasons.get("mosaic_sm90", f"found {capability}")
    assert choose_kernels(jax.devices("cpu")[0]) == (("xla",), {})


@pytest.mark.ci
@pytest.mark.parametrize("measure", ["gemm", "dx"])
def test_triton_is_measured_beside_its_own_dense_kernel(measure):
    pytest.importorskip("jax_triton")
    from tests.kernels.triton_interpreter import triton_kernels

    problem = dataclasses.replace(GEMM, measure=measure)
    with triton_kernels():
        case = make_case(problem, kernels=("triton",), on_cpu=True)
        values = measure_case(case, **QUICK)
    assert set(values) == {"triton", "dense"} | ({"dense_triton"} if measure == "gemm" else set())
    assert all("tflops_per_second" in value for value in values.values()), values
    # Both dense products multiply by the whole weight, and one reference serves them.
    assert len(set(case.references.values())) == 1


def test_dense_products_take_the_tile_of_sparse_ones_with_the_stages_that_fit():
    for capability in list_targets():
        row = triton_tiles.find_row(triton_tiles._TABLE, capability)
        for cut in filter(None, (row.product, row.wide_product)):
            fitted = fit_dense(cut, capability)
            assert fitted._replace(stages=cut.stages) == cut and 2 <= fitted.stages <= cut.stages
            taken = fitted.stages * 128 * (cut.rows + cut.columns)
            assert taken <= find_block_bytes(capability)
            more = taken + 128 * (cut.rows + cut.columns)
            assert fitted == cut or more > find_block_bytes(capability)


@pytest.mark.ci
def test_packed_weights_must_have_equal_bits():
    problem = dataclasses.replace(GEMM, measure="pack")
    packed = make_sparse(problem, "xla")(inputs_of(problem))
    error, tolerance = make_error(problem)
    assert error(packed, packed) == tolerance == 0
    words = packed.along_k.metadata
    flipped = packed.along_k._replace(metadata=words.at[0, 0, 0].set(words[0, 0, 0] ^ 1))
    assert error(dataclasses.replace(packed, along_k=flipped), packed) == 1 / words.size
    zeros = jnp.zeros((2,), jnp.bfloat16)
    assert share_of_different_bits(-zeros, zeros) == 1
    with pytest.raises(ValueError, match="actual has"):
        share_of_different_bits(zeros, zeros[:1])


def test_a_pruned_gradient_may_differ_in_some_draws_but_not_in_all():
    error, tolerance = make_error(dataclasses.replace(FFN, grad_pruning="mvue"))
    ones = dict.fromkeys(("y", "dx", "dw_up", "dw_down"), jnp.ones((8, 8)))
    for name in ones:
        off = {**ones, name: ones[name] * 1.05}
        assert (error([off], [ones]) <= tolerance) == (name == "dw_up")
    assert error([{**ones, "dw_up": ones["dw_up"] * 1.11}], [ones]) > tolerance


def test_candidate_tiles_fit():
    for product in list_products():
        candidates = list_candidates(product)
        assert candidates and len(set(candidates)) == len(candidates)
        for tiles in candidates:
            assert tiles.columns <= product.columns
            assert product.contraction % tiles.contraction == 0
            assert count_shared_bytes(product.as_kernel_problem(), tiles) <= SHARED_MEMORY_BYTES
            assert tiles.blocks == 2 or not product.is_gated
            assert read_tiles(name_tiles(tiles)) == tiles


@pytest.mark.ci
@pytest.mark.parametrize("dense_is_transposed", [True, False])
def test_operands_of_a_tile_point_are_as_the_kernel_takes_them(dense_is_transposed):
    product = Product(
        rows=128, contraction=64, columns=192, dense_is_transposed=dense_is_transposed
    )
    s = make_product_inputs(product, 0)
    assert s.packed.along_k.shape == (128, 64)
    assert s.d_out.shape == ((192, 64) if dense_is_transposed else (64, 192))


@pytest.mark.ci
def test_what_is_timed_as_dx_is_one_kernel_a_set_and_no_forward_product():
    problem = dataclasses.replace(GEMM, measure="dx")
    s = jax.eval_shape(functools.partial(make_inputs, problem, 0, packs=True))
    report = aot.compile_for(on_every_set(make_sparse(problem, "mosaic_sm90")), s, s)
    assert len(report.kernels) == 1 and report.hlo.count("kernel_hash = ") == 2
    assert "gemm" not in report.hlo
