"""The search in Triton compiled for absent GPUs: no spills, few instructions for each tile."""

import functools

import jax
import pytest

from pallas_kernels import aot, transposable_mask
from pallas_kernels.machine_code import parse
from pallas_kernels.transposable_mask.call import TransposableFacts
from pallas_kernels.transposable_mask.triton.tiles import CAPABILITIES, find_tile
from tests.kernels.tiers import tier

pytest.importorskip("jax_triton")

CALLS = [
    TransposableFacts(rows=4096, columns=4096, dtype="bfloat16"),
    TransposableFacts(rows=4096, columns=4096, dtype="float16"),
    TransposableFacts(rows=4096, columns=4096, dtype="float32"),
    # Feed-forward weights of all layers of GPT-2 124M and 1558M: no power of two.
    TransposableFacts(rows=12 * 768, columns=3072, dtype="float32"),
    TransposableFacts(rows=48 * 6400, columns=1600, dtype="float32"),
    # Rows that do not begin at multiples of 16 bytes.
    TransposableFacts(rows=64, columns=20, dtype="bfloat16"),
]
# A target of each compute capability.
_TARGETS = ("a100", "rtx3090", "l40s", "h200", "b200", "rtx5090")
_MOST_INSTRUCTIONS = 330


def _compile(facts, target):
    gpu = aot.TARGETS[target]
    w = jax.ShapeDtypeStruct((facts.rows, facts.columns), facts.dtype)
    search = functools.partial(transposable_mask, implementation="triton")
    return gpu, aot.compile_for(search, w, mesh=aot.make_gpu_mesh(gpu))


def _check(facts, target):
    gpu, report = _compile(facts, target)
    (kernel,) = report.kernels
    assert kernel.name == "transposable_mask"
    assert (kernel.spill_bytes, kernel.stack_bytes, kernel.shared_memory_bytes) == (0, 0, 0)
    # Registers for 1024 threads, half of what a processor holds.
    assert 0 < kernel.registers <= 64
    major, minor = gpu.compute_capability
    assert f".target sm_{major}{minor}" in kernel.ptx.replace("\t", " ")
    return kernel, report


@pytest.mark.parametrize("target", tier({t: t for t in ("h200", "a100")}, fast=["h200"]))
def test_a_lane_searches_a_tile_in_few_instructions(target):
    facts = CALLS[0]
    kernel, report = _check(facts, target)
    code = [line.base for line in parse(kernel.sass).code if line.base != "NOP"]
    tile = find_tile(aot.TARGETS[target].compute_capability)
    assert tile.rows * tile.columns == 16 * 32 * tile.warps
    assert len(code) < _MOST_INSTRUCTIONS
    # A row of a tile is loaded and stored at once, and lanes exchange nothing.
    assert (code.count("LDG"), code.count("STG"), code.count("SHFL"), code.count("BAR")) == (
        4, 4, 0, 0
    )  # fmt: skip
    # 18 choices of two sums each, 8 sums of two rows, and the sums of the nine kinds.
    assert code.count("FADD") == 2 * 18 + 8 + 2 * 6 + 2 + 5
    # Weights are read where they lie, and the mask is written once.
    assert report.temp_bytes < 2**16


@pytest.mark.ci
@pytest.mark.parametrize("target", ["a100", "rtx5090"])
@pytest.mark.parametrize("facts", CALLS, ids=str)
def test_the_kernel_compiles_without_spills(facts, target):
    _check(facts, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", _TARGETS)
@pytest.mark.parametrize("facts", CALLS, ids=str)
def test_the_kernel_compiles_without_spills_for_every_family(facts, target):
    _check(facts, target)


def test_every_row_of_the_table_has_a_target():
    assert set(CAPABILITIES) == {aot.TARGETS[target].compute_capability for target in _TARGETS}
