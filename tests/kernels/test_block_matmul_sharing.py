"""What tiles of the Hopper kernels of `block_sparse_matmul` share, interpreted.

Two blocks of dw share the left operand; two programs of a cluster share the weight.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_sparse_matmul.mosaic_sm90 import products
from pallas_kernels.block_sparse_matmul.mosaic_sm90.plan import Plan
from pallas_kernels.block_sparse_matmul.mosaic_sm90.products import make_row_plan, pair_blocks
from pallas_kernels.doctor.oracles import error, make_masks, make_normal
from tests.kernels.block_rows import check_rows
from tests.kernels.interpreter import hopper, miss_barrier
from tests.tiers import tier

needs_interpreter = pytest.mark.skipif(
    jax.default_backend() == "gpu", reason="a broken kernel may hang a GPU"
)
_BLOCKS = {"64x64": (64, 64), "128x64": (128, 64), "128x128": (128, 128)}
# When copies land, and what draws if at random.
TIMES = {"early": ("early", 0), "late": ("late", 0), "random": ("random", 1)}


@pytest.mark.parametrize("name", ["random", "full", "empty_rows", "global_row_and_column"])
@pytest.mark.parametrize("num_programs", [2, 7, 10_000])
def test_every_block_stands_on_one_list(name, num_programs):
    mask = np.asarray(make_masks((5, 7))[name])
    with jax.numpy_rank_promotion("raise"):
        lists = pair_blocks(jnp.asarray(mask), 3, num_programs=num_programs)
    owners, counts, others = (np.asarray(x) for x in (lists.owners, lists.counts, lists.others))
    written = np.concatenate([owners[owners >= 0], others[others >= 0]])
    assert sorted(written) == list(range(mask.size))
    is_kept = mask.ravel()
    assert (counts[owners >= 0] == np.where(is_kept[owners[owners >= 0]], 3, 0)).all()
    assert (counts[owners < 0] == 0).all() and (others[owners < 0] == -1).all()
    first, second = owners[others >= 0], others[others >= 0]
    assert is_kept[first].all() and is_kept[second].all()
    assert (first // 7 == second // 7).all() and (first < second).all()
    # Tiles that take longest come first.
    work = counts * (1 + (others >= 0))
    assert (np.diff(work) <= 0).all()
    if first.size:
        # Of a row at most one kept block is alone.
        alone = owners[(counts > 0) & (others < 0)]
        assert np.bincount(alone // 7, minlength=5).max() <= 1


def test_blocks_are_paired_where_that_is_faster():
    def count_pairs(num_programs):
        lists = pair_blocks(jnp.ones((4, 4), bool), 1, num_programs=num_programs)
        return int((np.asarray(lists.others) >= 0).sum())

    # Sixteen blocks: a round of one, or of two, which is longer; two or one; three or two; many.
    assert [count_pairs(n) for n in (16, 8, 6, 2)] == [0, 8, 0, 8]


def multiply_gradient(blocks, mask, times, *, num_tokens=130):
    """Return dw, and what it should be; dy has NaN where it meets no kept block."""
    mask = np.asarray(mask, bool)
    K, N = (count * side for count, side in zip(mask.shape, blocks, strict=True))
    x, dy = make_normal(((num_tokens, K), (num_tokens, N)), "bfloat16")
    dy = jnp.where(np.repeat(mask.any(0), blocks[1]), dy, jnp.nan)
    with hopper(*times):
        # A new function each time: what a compiled one has traced stays.
        dw = jax.jit(lambda *args: products.multiply_gradient(*args))(x, dy, jnp.asarray(mask))
        jax.block_until_ready(dw)
    kept = np.kron(mask, np.ones(blocks)).astype(bool)
    exact = np.asarray(x, np.float32).T @ np.asarray(dy, np.float32)
    return dw, np.where(kept, exact, 0)


# Neighbours, others in between, one alone, none; of the last column, none.
_MASK = [[1, 1, 1, 1, 1, 0], [1, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 1, 0]]


def check_gradient(blocks, times, mask=_MASK):
    dw, exact = multiply_gradient(blocks, mask, times)
    assert error(dw, exact) <= 2.0**-8 * np.abs(exact).max()
    np.testing.assert_array_equal(np.asarray(dw, np.float32)[exact == 0], 0)
    return dw


@pytest.mark.parametrize("blocks", tier(_BLOCKS, fast=["64x64"], slow=["128x128"]))
def test_two_blocks_have_the_bits_of_one_and_one(blocks, monkeypatch):
    together = check_gradient(blocks, TIMES["early"])
    assert (together == check_gradient(blocks, TIMES["late"])).all()
    monkeypatch.setattr(products, "count_processors", lambda: 64)
    assert (together == check_gradient(blocks, TIMES["early"])).all()


@pytest.mark.slow
@pytest.mark.parametrize("blocks", _BLOCKS.values(), ids=_BLOCKS)
@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
def test_two_blocks_whenever_copies_land(blocks, times):
    check_gradient(blocks, times)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("blocks", "mask"), [((128, 64), [[1], [0]]), ((64, 128), [[1, 1, 1, 0]])], ids=str
)
def test_where_no_two_blocks_fit(blocks, mask):
    # One column of blocks, or too much shared memory.
    mask = np.asarray(mask, bool)
    shape = tuple(count * side for count, side in zip(mask.shape, blocks, strict=True))
    assert products.make_gradient_plan(shape, mask.shape).blocks == 1
    check_gradient(blocks, TIMES["early"], mask)


def _second_block_of_the_first(lists):
    return lists._replace(others=jnp.where(lists.others >= 0, lists.owners + 1, -1))


def _second_block_is_forgotten(lists):
    return lists._replace(others=jnp.full_like(lists.others, -1))


def _pruned_blocks_are_forgotten(lists):
    return lists._replace(owners=jnp.where(lists.counts > 0, lists.owners, -1))


@pytest.mark.ci
@needs_interpreter
@pytest.mark.parametrize(
    "change",
    [_second_block_of_the_first, _second_block_is_forgotten, _pruned_blocks_are_forgotten],
)
def test_broken_lists_are_noticed(change, monkeypatch):
    monkeypatch.setattr(
        products, "pair_blocks", lambda *args, **options: change(pair_blocks(*args, **options))
    )
    with pytest.raises(AssertionError):
        check_gradient((64, 64), TIMES["early"])


def check_cluster(blocks, mask, *, num_rows, num_programs=6, **options):
    """Multiply by clusters of two, with a bias; return the result and the plan."""
    programs = {"planned_for": num_programs, "num_programs": num_programs}
    got, plan = check_rows(num_rows, blocks, mask, **programs, **options)
    assert plan.cluster == 2
    return got, plan


# Lists of four, two, one and no blocks.
_UNEVEN = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize("transposed", tier({"y": False, "dx": True}, fast=["y"], slow=["dx"]))
@pytest.mark.parametrize("times", tier(TIMES, fast=["random"], slow=["early", "late"]))
def test_clusters(transposed, times):
    got, _ = check_cluster((64, 64), _UNEVEN, num_rows=256, times=times, transposed=transposed)
    again, _ = check_cluster((64, 64), _UNEVEN, num_rows=256, times=times, transposed=transposed)
    assert (got == again).all()


@pytest.mark.ci
def test_clusters_of_tall_tiles_and_groups_of_them(monkeypatch):
    monkeypatch.setattr(products, "_GROUP", 4)
    check = functools.partial(check_cluster, (64, 64), [[1, 0], [1, 1]], times=TIMES["late"])
    # Six row tiles of 256, four and two of them together; two clusters.
    _, plan = check(num_rows=1536, num_programs=4)
    assert plan.shape == (128, 64) and plan.num_row_tiles == 6 and plan.group == 4


def test_where_there_are_clusters():
    def count(num_rows, num_programs):
        plan = make_row_plan(
            num_rows, (512, 512), (8, 8), transposed=False, num_programs=num_programs
        )
        return plan.cluster

    assert count(128, 132) == 1 and count(256, 132) == 2 and count(257, 132) == 1
    assert count(256, 131) == 1


@pytest.mark.ci
@needs_interpreter
def test_a_cluster_without_ranks_is_noticed(monkeypatch):
    locate = Plan.locate
    monkeypatch.setattr(
        Plan, "locate", lambda plan, tile, lists, rank: locate(plan, tile, lists, 0)
    )
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)):
        check_cluster((64, 64), _UNEVEN, num_rows=256, times=TIMES["early"])


@pytest.mark.ci
@needs_interpreter
def test_a_slot_that_another_program_still_reads_is_noticed(monkeypatch):
    # The second wait in the program is for a slot that both programs have given back.
    miss_barrier(monkeypatch, 1)
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)):
        check_cluster((64, 64), np.ones((9, 4)), num_rows=256, times=TIMES["early"])
