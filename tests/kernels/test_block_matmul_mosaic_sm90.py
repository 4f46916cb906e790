"""The Hopper kernels of `block_sparse_matmul`: interpreted, or on a GPU where there is one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sparse_matmul
from pallas_kernels.block_sparse_matmul.mosaic_sm90 import products
from pallas_kernels.block_sparse_matmul.mosaic_sm90.plan import count_stages
from pallas_kernels.block_sparse_matmul.mosaic_sm90.products import (
    make_gradient_plan,
    make_row_plan,
)
from pallas_kernels.doctor.oracles import make_normal
from pallas_kernels.hopper.budget import SHARED_MEMORY_BYTES
from tests.kernels.block_matmul_contract import (
    BlockMatmulCase,
    call_block_matmul,
    check_block_matmul,
)
from tests.kernels.block_rows import check_rows
from tests.kernels.interpreter import hopper, miss_barrier
from tests.tiers import tier

SMALL = BlockMatmulCase(
    leading=(2, 65),
    grid=(2, 3),
    block=(64, 64),
    dtype="bfloat16",
    # Lists of several lengths, of one and of none; a gradient of more than what is kept.
    mask_names=("global_row_and_column", "gradient of everything", "empty_columns"),
)
CASES = {
    "small": dataclasses.replace(SMALL, leading=(65,), mask_names=("gradient of everything",)),
    "64x64": SMALL,
    "128x64_f16": dataclasses.replace(SMALL, block=(128, 64), dtype="float16"),
}
SLOW_CASES = {
    "64x128": dataclasses.replace(SMALL, block=(64, 128)),
    "128x128": dataclasses.replace(SMALL, block=(128, 128)),
    "every_mask": dataclasses.replace(SMALL, leading=(64,), mask_names=None),
    "every_mask_128": dataclasses.replace(
        SMALL, leading=(7,), block=(128, 128), dtype="float16", mask_names=None
    ),
}


@pytest.mark.parametrize("case", tier(CASES, fast=["small"], slow=["64x64"]))
def test_contract(case):
    with hopper():
        check_block_matmul(case, call_block_matmul("mosaic_sm90"))


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_CASES.values(), ids=SLOW_CASES)
def test_contract_of_every_block(case):
    with hopper():
        check_block_matmul(case, call_block_matmul("mosaic_sm90"))


@pytest.mark.ci
def test_tall_tiles_and_groups_of_them(monkeypatch):
    monkeypatch.setattr(products, "_GROUP", 2)
    _, plan = check_rows(768, (64, 64), [[1, 0], [1, 0]], num_programs=2)
    # Three row tiles of 256, two and one of them together.
    assert plan.shape == (128, 64) and plan.num_row_tiles == 3 and plan.group == 2


@pytest.mark.ci
@pytest.mark.parametrize(
    ("num_programs", "transposed"),
    [(1, True), (64, False), pytest.param(3, True, marks=pytest.mark.slow)],
)
def test_any_number_of_programs(num_programs, transposed):
    mask = [[1, 0, 1], [1, 0, 0]]
    check_rows(
        128, (128, 64), mask, transposed=transposed, planned_for=9, num_programs=num_programs
    )


@pytest.mark.slow
def test_a_ring_is_used_again_and_again():
    mask = np.ones((9, 1))
    _, plan = check_rows(128, (128, 64), mask, planned_for=9)
    assert 9 * plan.steps_per_entry > 2 * count_stages(plan)


@pytest.mark.parametrize("blocks", [(64, 64), (64, 128), (128, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("num_rows", [128, 8192])
def test_chosen_tiles_fit(blocks, num_rows):
    shape, grid = (8 * blocks[0], 6 * blocks[1]), (8, 6)
    plans = [make_gradient_plan(shape, grid)]
    plans += [
        make_row_plan(num_rows, shape, grid, transposed=transposed, num_programs=132)
        for transposed in (False, True)
    ]
    for plan in plans:
        stages = count_stages(plan)
        assert 3 <= stages <= 6
        assert stages * plan.step_bytes < SHARED_MEMORY_BYTES


@pytest.mark.ci
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a missing barrier may hang a GPU")
@pytest.mark.parametrize(
    "missing",
    [0, 1, 4, 5],
    ids=["announcement_overwritten", "slot_reused", "announcement_read", "tile_read"],
)
def test_a_missing_barrier_is_noticed(missing, monkeypatch):
    # Awaited in the order: an announcement and a slot that are filled again, all of both at the
    # end, an announcement, a tile to multiply.
    miss_barrier(monkeypatch, missing)
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)):
        check_rows(128, (64, 64), np.ones((9, 4)), planned_for=9)


@pytest.mark.ci
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a missing barrier may hang a GPU")
@pytest.mark.parametrize(
    ("missing", "num_blocks"),
    [(11, 2), (12, 2), (8, 4), (9, 4)],
    ids=["sum_overwritten", "sum_read", "first_of_two_overwritten", "second_of_two_read"],
)
def test_a_missing_barrier_between_warpgroups_is_noticed(missing, num_blocks, monkeypatch):
    # The loop of two blocks comes first in the program. Four blocks are two tiles of two.
    miss_barrier(monkeypatch, missing)
    x, dy = make_normal(((128, 64), (128, num_blocks * 64)), "bfloat16")
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)), hopper():
        jax.block_until_ready(products.multiply_gradient(x, dy, jnp.ones((1, num_blocks), bool)))


def _lists_of_other_owners(monkeypatch):
    start = products._start_longest_first
    monkeypatch.setattr(
        products,
        "_start_longest_first",
        lambda *args: start(*args)._replace(owners=jnp.arange(len(args[0]), dtype=jnp.int32)),
    )


def _first_half_of_each_block(monkeypatch):
    make = products.make_row_plan

    def broken(*args, **options):
        return make(*args, **options)._replace(steps_per_entry=1)

    monkeypatch.setattr(products, "make_row_plan", broken)


def _half_of_the_tokens(monkeypatch):
    make = products.make_gradient_plan

    def read_as_the_first(tile):
        def find(row_tile, owner, entry, piece, part):
            return tile.find(row_tile, owner, entry, piece, 0)

        return tile._replace(find=find)

    def broken(*args):
        plan = make(*args)
        return plan._replace(lhs=read_as_the_first(plan.lhs), rhs=read_as_the_first(plan.rhs))

    monkeypatch.setattr(products, "make_gradient_plan", broken)


@pytest.mark.parametrize(
    ("broken", "case", "part"),
    [
        pytest.param(_lists_of_other_owners, "64x64", "y", marks=pytest.mark.slow),
        pytest.param(_first_half_of_each_block, "128x64_f16", "y", marks=pytest.mark.ci),
        pytest.param(_half_of_the_tokens, "64x64", "dw", marks=pytest.mark.ci),
    ],
)
def test_the_contract_rejects_broken_plans(broken, case, part, monkeypatch):
    broken(monkeypatch)
    case = dataclasses.replace(CASES[case], leading=(128,), mask_names=("global_row_and_column",))
    with pytest.raises(AssertionError, match=f"^{part} of mask"), hopper():
        check_block_matmul(case, call_block_matmul("mosaic_sm90"))


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((64, 64), "float32", "bfloat16 and float16, got float32"),
        ((32, 64), "bfloat16", r"one of \(64, 128\), got \(32, 64\) from w_KN.shape=\(64, 64\)"),
    ],
)
def test_what_the_kernels_do_not_do_is_refused_with_the_reason(shape, dtype, message):
    x, w = make_normal(((8, 64), (64, 64)), dtype)
    mask = jnp.ones((64 // shape[0], 64 // shape[1]), bool)
    with hopper(), pytest.raises(NotImplementedError, match=message):
        block_sparse_matmul(x, w, mask, implementation="mosaic_sm90")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there may be a Hopper GPU")
def test_a_cpu_is_refused():
    x, w = make_normal(((8, 64), (64, 64)), "bfloat16")
    with pytest.raises(NotImplementedError, match="needs a Hopper GPU .*found 'cpu'"):
        block_sparse_matmul(x, w, jnp.ones((1, 1), bool), implementation="mosaic_sm90")
