"""Lists as the Hopper kernels read and walk them, against masks written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import make_block_schedule
from pallas_kernels.block_sparse_attention.block_schedule import drop_blocks_above_diagonal
from pallas_kernels.block_sparse_attention.call import AttentionFacts
from pallas_kernels.block_sparse_attention.mosaic_sm90.attention import make_problem
from pallas_kernels.block_sparse_attention.mosaic_sm90.fwd import make_forward_walk
from pallas_kernels.block_sparse_attention.mosaic_sm90.tile_lists import (
    BITS,
    make_grain,
    make_key_lists,
    make_order,
    make_query_lists,
)
from pallas_kernels.block_sparse_attention.mosaic_sm90.walk import (
    count_copies,
    count_rounds,
    find_item,
)


@functools.partial(
    jax.jit, static_argnames=("block_q", "block_kv", "causal", "all_masked", "group")
)
def _make_lists(mask, block_q, block_kv, *, group=1, **options):
    """Return the lists of queries and of keys."""
    schedule, grain = make_block_schedule(mask), make_grain(block_q, block_kv)
    if options["causal"]:
        schedule = drop_blocks_above_diagonal(schedule, block_q=block_q, block_kv=block_kv)
    by_query = make_query_lists(schedule, grain, **options)
    return by_query, make_key_lists(schedule, grain, **options, group=group)


def _read(lists, unit):
    entries = np.asarray(lists.entries[unit, : lists.counts[unit]])
    return [divmod(int(entry), BITS) for entry in entries], int(lists.num_leading[unit])


@pytest.mark.parametrize(
    ("block_q", "block_kv"),
    [(64, 64), *(pytest.param(*x, marks=pytest.mark.ci) for x in ((128, 64), (64, 128)))],
)
def test_lists_hold_the_kept_blocks_and_set_the_diagonal_apart(block_q, block_kv):
    grid = (384 // block_q, 384 // block_kv)
    mask = np.random.default_rng(0).random((1, 2, *grid)) < 0.6
    q_at, kv_at = np.arange(384).reshape(grid[0], -1), np.arange(384).reshape(grid[1], -1)
    seen = [[q[-1] >= kv[0] for kv in kv_at] for q in q_at]
    clear = np.array([[q[0] >= kv[-1] for kv in kv_at] for q in q_at])
    kept = mask & np.array(seen)
    by_query, by_key = _make_lists(mask, block_q, block_kv, causal=True, all_masked=False)
    for head in range(2):
        for i in range(grid[0]):
            entries, num_clear = _read(by_query, head * grid[0] + i)
            blocks = [index for index, _ in entries]
            assert sorted(blocks) == np.flatnonzero(kept[0, head, i]).tolist()
            assert [clear[i, j] for j in blocks] == [n < num_clear for n in range(len(blocks))]
        for j in range(grid[1]):
            entries, num_crossed = _read(by_key, head * grid[1] + j)
            blocks = [index for index, _ in entries]
            assert sorted(blocks) == np.flatnonzero(kept[0, head, :, j]).tolist()
            assert [~clear[i, j] for i in blocks] == [n < num_crossed for n in range(len(blocks))]


def test_blocks_of_32_meet_in_one_tile_with_their_bits():
    mask = np.zeros((1, 1, 4, 4), bool)
    mask[0, 0, 0, 1] = mask[0, 0, 1, 0] = mask[0, 0, 3, 3] = True
    by_query, by_key = _make_lists(mask, 32, 32, causal=False, all_masked=True)
    assert _read(by_query, 0) == ([(0, 0b0110)], 0)
    assert _read(by_query, 1) == ([(1, 0b1000)], 0)
    assert _read(by_key, 0) == ([(0, 0b0110)], 1)
    assert _read(by_key, 1) == ([(1, 0b1000)], 1)


def test_heads_of_a_group_are_joined_with_masked_tiles_first():
    mask = np.tril(np.ones((1, 2, 3, 3), bool))
    mask[0, 1, 2, 0] = False
    _, lists = _make_lists(mask, 64, 64, causal=True, all_masked=False, group=2)
    # Index 3 g + i is block i of head g; the diagonal needs a mask.
    assert _read(lists, 0) == ([(0, 0), (3, 0), (1, 0), (2, 0), (4, 0)], 2)


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("counts", [[0, 0], [5], [1, 9, 8, 70, 2, 0, 64, 3], [4, 4, 5, 4]])
def test_the_longest_lists_come_first_and_equal_ones_copy_by_copy(counts, copies):
    order = make_order(jnp.array(counts), copies).tolist()
    assert sorted(order) == list(range(copies * len(counts)))
    keys = [(-counts[place % len(counts)], place) for place in order]
    assert keys == sorted(keys)


@pytest.mark.ci
@pytest.mark.parametrize("masks", [(1, 1), (1, 3), (3, 1), (3, 3)])
@pytest.mark.parametrize("block_q", [64, 128])
def test_rounds_find_every_list_once_and_begin_with_the_longest(masks, block_q):
    mask = np.random.default_rng(0).random((*masks, 17, 40)) < 0.05
    mask[:, :, 5] = True
    facts = AttentionFacts(
        batch=3, num_queries=17 * block_q, num_keys=40 * 64, num_heads=3, num_kv_heads=3,
        head_dim=64, dtype="bfloat16", mask_shape=masks, block_q=block_q, block_kv=64,
        causal=False, has_kv_mask=False, has_segments=False, scale=1.0, pruned_logits="masked",
        return_lse=True,
    )  # fmt: skip
    problem = make_problem(facts)
    walk = make_forward_walk(problem)
    options = {"causal": False, "all_masked": False, "copies": count_copies(problem, walk)}
    lists = make_query_lists(make_block_schedule(jnp.asarray(mask)), problem.grain, **options)

    indices = jnp.arange(count_rounds(problem, walk) * walk.rings)
    heads = lists.list_heads()
    found, first = jax.vmap(lambda i: find_item(problem, walk, heads, i, jnp.int32(0)))(indices)
    found = jax.tree.map(np.asarray, found)
    some = found.count > 0
    np.testing.assert_array_equal(first[some], lists.entries[found.unit[some], 0])
    # 153 items: the last round of two lists has one.
    assert found.count[~found.valid].tolist() == [0] * (block_q == 64)
    places = (found.batch, found.head, found.block)
    items = list(zip(*(x[found.valid].tolist() for x in places), strict=True))
    assert len(items) == len(set(items)) == 3 * 3 * 17
    kept = np.broadcast_to(mask.sum(-1), (3, 3, 17))
    counts = found.count[found.valid]
    assert counts.tolist() == [kept[item] for item in items]
    assert all(block == 5 for _, _, block in items[:9])
    assert (np.diff(counts) <= 0).all()
