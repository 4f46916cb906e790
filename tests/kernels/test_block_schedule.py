"""Schedules by hand, and that causality prunes a schedule as it prunes a mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import make_block_schedule
from pallas_kernels.block_sparse_attention.block_schedule import (
    drop_blocks_above_diagonal,
    unpack_block_schedule,
)
from pallas_kernels.block_sparse_attention.softmax_rules import count_visible


def _random_mask(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).random(shape) < 0.4)


def _kept(counts, indices):
    return [row[:count].tolist() for count, row in zip(counts, np.asarray(indices), strict=True)]


def test_lists_of_a_hand_drawn_mask():
    mask = jnp.array([[1, 0, 1], [0, 0, 0]], bool)
    schedule = make_block_schedule(mask)
    assert _kept(schedule.kv_counts, schedule.kv_indices) == [[0, 2], []]
    assert _kept(schedule.q_counts, schedule.q_indices) == [[0], [], [0]]


def test_a_schedule_unpacks_to_its_mask():
    mask = _random_mask(3, 2, 5, 7)
    np.testing.assert_array_equal(unpack_block_schedule(make_block_schedule(mask)), mask)


def test_stacked_masks_and_vmap_agree():
    mask = _random_mask(3, 2, 5, 7)
    stacked, mapped = make_block_schedule(mask), jax.vmap(make_block_schedule)(mask)
    jax.tree.map(np.testing.assert_array_equal, stacked, mapped)
    assert stacked.kv_indices.shape == (3, 2, 5, 7) and stacked.q_indices.shape == (3, 2, 7, 5)


@pytest.mark.parametrize(("block_q", "block_kv"), [(16, 16), (16, 32), (32, 16), (24, 16)])
def test_causality_prunes_a_schedule_as_it_prunes_a_mask(block_q, block_kv):
    mask = _random_mask(2, 6, 5)
    last_query = (np.arange(6) + 1)[:, None] * block_q - 1
    visible = mask & (last_query >= np.arange(5) * block_kv)
    drop = functools.partial(drop_blocks_above_diagonal, block_q=block_q, block_kv=block_kv)
    make = jax.jit(make_block_schedule)
    pruned, expected = jax.jit(drop)(make(mask)), make(visible)
    for batch in range(2):
        for counts, indices in (("kv_counts", "kv_indices"), ("q_counts", "q_indices")):
            lists = (
                _kept(getattr(s, counts)[batch], getattr(s, indices)[batch])
                for s in (pruned, expected)
            )
            assert next(lists) == next(lists)
    np.testing.assert_array_equal(unpack_block_schedule(pruned), visible)


@pytest.mark.parametrize("mask", [jnp.ones((2, 2)), jnp.ones(3, bool)])
def test_a_mask_that_is_none_is_refused(mask):
    with pytest.raises(ValueError, match=r"mask must be bool\[..., I, J\], got mask.dtype="):
        make_block_schedule(mask)


@pytest.mark.parametrize("causal", [False, True])
def test_visible_positions_of_segments_are_counted_one_by_one(causal):
    segments = np.random.default_rng(0).integers(-2, 3, (2, 20))
    visible = segments[:, :, None] == segments[:, None, :]
    if causal:
        visible &= np.tri(20, dtype=bool)
    counted = count_visible(20, 20, causal=causal, segment_ids=jnp.asarray(segments))
    np.testing.assert_array_equal(counted, visible.sum(axis=-1))


def test_visible_positions_of_sequences_of_unequal_length():
    counted = count_visible(5, 3, causal=True, segment_ids=None)
    np.testing.assert_array_equal(counted, [[1, 2, 3, 3, 3]])
