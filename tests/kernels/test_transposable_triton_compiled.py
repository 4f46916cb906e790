"""The search in Triton compiled for absent GPUs: few instructions for each tile."""

import functools

import jax
import pytest

from pallas_kernels import aot, transposable_mask
from pallas_kernels.machine_code import parse
from pallas_kernels.transposable_mask.call import TransposableFacts
from pallas_kernels.transposable_mask.triton.tiles import find_tile
from tests.tiers import tier

pytest.importorskip("jax_triton")

_MOST_INSTRUCTIONS = 330


def _compile(facts, target):
    gpu = aot.TARGETS[target]
    w = jax.ShapeDtypeStruct((facts.rows, facts.columns), facts.dtype)
    search = functools.partial(transposable_mask, implementation="triton")
    report = aot.compile_for(search, w, mesh=aot.make_gpu_mesh(gpu))
    (kernel,) = report.kernels
    assert kernel.name == "transposable_mask"
    assert (kernel.spill_bytes, kernel.stack_bytes, kernel.shared_memory_bytes) == (0, 0, 0)
    return kernel, report


@pytest.mark.parametrize("target", tier({t: t for t in ("h200", "a100")}, fast=["h200"]))
def test_a_lane_searches_a_tile_in_few_instructions(target):
    facts = TransposableFacts(rows=4096, columns=4096, dtype="bfloat16")
    kernel, report = _compile(facts, target)
    # Registers for 1024 threads, half of what a processor holds.
    assert 0 < kernel.registers <= 64
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
@pytest.mark.parametrize(
    "shape", [(48 * 6400, 1600), (64, 20)], ids=["layers of GPT-2 1558M", "rows not of 16 bytes"]
)
def test_other_sizes_do_not_spill(shape, target):
    rows, columns = shape
    _compile(TransposableFacts(rows=rows, columns=columns, dtype="bfloat16"), target)
