"""Flood filling: hand-worked grids, a plain NumPy telling of its rules, and their invariants."""

import functools
import math

import hypothesis
import hypothesis.extra.numpy as hypothesis_numpy
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks import block_density, flood_fill, flood_reach, top_k_blocks
from tests.masks.flood_oracles import flood_fill_oracle, flood_oracle


def draw_causal_maps(size, layers=3):
    """Pooled maps like those of decoders: a sink, a heavy diagonal, and noise elsewhere."""
    noise = np.random.default_rng(size).random((layers, size, size), np.float32)
    distance = np.subtract.outer(np.arange(size), np.arange(size))
    maps = noise + 2 * (np.arange(size) == 0) + 4 * np.exp(-distance.clip(0) / 2)
    return np.tril(maps).astype(np.float32)


def off_diagonal_blocks(mask):
    mask = np.array(mask)
    return {(int(i), int(j)) for i, j in zip(*np.nonzero(mask), strict=True) if i != j}


TIE_OF_DOWN_AND_DIAGONAL = [[0, 0, 0], [0, 0, 0], [5, 5, 0]]
TIE_OF_DOWN_AND_RIGHT = [[0, 5, 0], [5, 0, 0], [0, 0, 0]]
START_IS_LARGEST = [[0, 0, 0], [0, 10, 0], [9, 0, 0]]
# Only the walk that arrives at (3, 1), which is below the threshold, slides on to (3, 2).
SLIDE_ON_LAST_ROW = [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 7, 0], [0, 1, 5, 8]]


@pytest.mark.parametrize(
    ("grid", "quantile", "expected"),
    [
        pytest.param(TIE_OF_DOWN_AND_DIAGONAL, 0.5, {(2, 1)}, id="down-diagonal-tie"),
        pytest.param(
            np.transpose(TIE_OF_DOWN_AND_DIAGONAL), 0.5, {(1, 2)}, id="right-diagonal-tie"
        ),
        pytest.param(TIE_OF_DOWN_AND_RIGHT, 0.5, {(0, 1)}, id="down-right-tie-goes-right"),
        pytest.param(START_IS_LARGEST, 0.5, set(), id="start-never-tested"),
        pytest.param(SLIDE_ON_LAST_ROW, 0.85, {(3, 2)}, id="slide-on-last-row"),
        pytest.param(np.transpose(SLIDE_ON_LAST_ROW), 0.85, {(2, 3)}, id="slide-on-last-column"),
    ],
)
def test_hand_worked_grids(grid, quantile, expected):
    kept = flood_fill(jnp.array(grid, jnp.float32), quantile=quantile)
    assert off_diagonal_blocks(kept) == expected
    assert kept.diagonal().all()


def test_causal_fill_starts_on_the_diagonal_and_sees_only_the_visible():
    # (3, 2) is found from the diagonal block (2, 2) alone. The upper triangle, were it to
    # count, would lift the threshold above everything; as zeros it would admit the 2s.
    grid = np.array(
        [
            [1, 99, 99, 99, 99],
            [2, 1, 99, 99, 99],
            [2, 2, 1, 99, 99],
            [2, 6, 5, 1, 99],
            [2, 7, 0, 0, 1],
        ],
        np.float32,
    )
    kept = flood_fill(jnp.array(grid), quantile=0.5, causal=True, walk="greedy")
    assert off_diagonal_blocks(kept) == {(3, 1), (4, 1), (3, 2)}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("quantile", [0.57, pytest.param(0.9, marks=pytest.mark.ci)])
@hypothesis.settings(derandomize=True)
@hypothesis.given(data=st.data())
def test_flood_fill_equals_the_rules_told_plainly(causal, quantile, data):
    elements = st.integers(0, 6).map(float)  # few values make many ties
    shape = (2, 6, 6)
    pooled = data.draw(hypothesis_numpy.arrays(np.float32, shape, elements=elements))
    kept = np.array(flood_fill(jnp.array(pooled), quantile=quantile, causal=causal, walk="greedy"))
    for layer, layer_kept in zip(pooled, kept, strict=True):
        expected = flood_fill_oracle(layer, quantile=quantile, causal=causal)
        np.testing.assert_array_equal(layer_kept, expected)
        if not causal:
            assert layer_kept.sum() <= math.ceil((1 - quantile) * 35) + 6


@pytest.mark.parametrize("causal", [pytest.param(False, marks=pytest.mark.ci), True])
@pytest.mark.parametrize("quantile", [0.57, pytest.param(0.9, marks=pytest.mark.ci)])
@hypothesis.settings(derandomize=True)
@hypothesis.given(data=st.data())
def test_a_flood_spreads_over_blocks_above_the_quantile(causal, quantile, data):
    elements = st.integers(0, 6).map(float)
    shape = (2, 6, 6)
    pooled = data.draw(hypothesis_numpy.arrays(np.float32, shape, elements=elements))
    kept = flood_fill(jnp.array(pooled), quantile=quantile, causal=causal, walk="flood")
    for layer, layer_kept in zip(pooled, kept, strict=True):
        values = layer[np.tril_indices(6)] if causal else layer
        threshold = np.quantile(values.astype(np.float64), quantile)
        expected = flood_oracle(layer, threshold=threshold, causal=causal)
        np.testing.assert_array_equal(layer_kept, expected)


def test_an_island_waits_for_a_bridge():
    # The 9 is the largest block, and only the 2 and the 3 lead to it.
    grid = np.array(
        [[7, 0, 0, 0, 0], [6, 7, 0, 0, 0], [1, 6, 7, 0, 0], [1, 2, 6, 7, 0], [1, 1, 9, 3, 7]],
        np.float32,
    )
    grid[3, 2] = 0
    kept = {
        density: off_diagonal_blocks(flood_fill(jnp.array(grid), density=density, causal=True))
        for density in (7 / 15, 8 / 15, 9 / 15)
    }
    assert kept[7 / 15] == {(1, 0), (2, 1)}
    assert kept[8 / 15] == {(1, 0), (2, 1), (4, 3)}
    assert kept[9 / 15] == {(1, 0), (2, 1), (4, 3), (3, 1)}
    more = off_diagonal_blocks(flood_fill(jnp.array(grid), density=10 / 15, causal=True))
    assert more == kept[9 / 15] | {(4, 2)}


@pytest.mark.parametrize("causal", [pytest.param(False, marks=pytest.mark.ci), True])
def test_a_flood_reaches_every_block_and_a_lower_quantile_keeps_a_superset(causal):
    maps = draw_causal_maps(24) if causal else np.random.default_rng(9).random((3, 24, 24))
    maps = jnp.asarray(maps, jnp.float32)
    visible = 24 * 25 // 2 if causal else 24**2
    before = np.eye(24, dtype=bool)
    for quantile in (0.9, 0.4, 1e-6):
        kept = np.array(flood_fill(maps, quantile=quantile, causal=causal, walk="flood"))
        assert (kept | ~before).all() and kept.diagonal(axis1=1, axis2=2).all()
        assert (kept.sum((1, 2)) <= math.ceil((1 - quantile) * visible) + 24).all()
        before = kept
    # Nothing is above the quantile but what is above the least block.
    assert (kept.sum((1, 2)) >= visible - 1).all()
    assert (flood_reach(maps, causal=causal, walk="flood") == 1).all()


@pytest.mark.parametrize("causal", [pytest.param(False, marks=pytest.mark.ci), True])
def test_a_density_is_met_exactly_and_more_of_it_keeps_a_superset(causal):
    maps = jnp.array(draw_causal_maps(16))
    visible = 16 * 17 // 2 if causal else 16**2
    before = np.eye(16, dtype=bool)
    # The density of a measured mask, rounded to f32, gives back its count.
    for count in (16, 41, visible):
        density = float(np.float32(count) / np.float32(visible))
        kept = np.array(flood_fill(maps, density=density, causal=causal, walk="flood"))
        np.testing.assert_array_equal(kept.sum((1, 2)), count)
        assert (kept | ~before).all() and not (causal and np.triu(kept, 1).any())
        before = kept


def test_greedy_walks_say_how_far_they_get_in_a_causal_map():
    maps = jnp.array(draw_causal_maps(32))
    reach = flood_reach(maps, causal=True, walk="greedy")
    assert (reach < 0.19).all(), "they stay on the diagonal and in the first column"
    kept = flood_fill(maps, causal=True, walk="greedy", density=0.3)
    np.testing.assert_allclose(block_density(kept, causal=True), reach, rtol=1e-6)
    flooded = flood_fill(maps, causal=True, density=0.3)
    np.testing.assert_array_equal(flooded.sum((1, 2)), 158)
    below, flooded_below = (
        np.array(mask).diagonal(-1, axis1=1, axis2=2).mean() for mask in (kept, flooded)
    )
    assert below < 0.2 and flooded_below == 1


@pytest.mark.ci
def test_random_maps_of_published_size():
    pooled = np.random.default_rng(0).random((300, 32, 32), np.float32)
    kept = np.array(flood_fill(jnp.array(pooled), quantile=0.96))
    for layer in range(3):
        expected = flood_fill_oracle(pooled[layer], quantile=0.96)
        np.testing.assert_array_equal(kept[layer], expected)
    above = pooled > np.quantile(pooled, 0.96, axis=(1, 2), keepdims=True)
    np.testing.assert_array_equal(above.sum((1, 2)), 41)
    # 25.25 in the long run, of which 0.65 are diagonal blocks that no walk reached.
    assert 24.5 < (kept & above).sum((1, 2)).mean() < 26


@pytest.mark.ci
@pytest.mark.parametrize("quantile", [0.81, pytest.param(0.99, marks=pytest.mark.ci)])
def test_constant_maps_keep_the_diagonal(quantile):
    # These quantiles of 36 values fall below some of the values if both neighbours are weighed.
    values = np.random.default_rng(8).random(1000, np.float32)
    kept = flood_fill(jnp.broadcast_to(values[:, None, None], (1000, 6, 6)), quantile=quantile)
    assert (kept == jnp.eye(6, dtype=bool)).all()


@pytest.mark.ci
@pytest.mark.parametrize("select", [flood_fill, functools.partial(top_k_blocks, exact=True)])
@pytest.mark.parametrize("causal", [False, True])
def test_a_density_of_a_map_with_a_nan_keeps_its_diagonal_alone(select, causal):
    pooled = np.random.default_rng(5).random((2, 5, 5), np.float32)
    pooled[0, 4, 1] = np.nan
    kept = np.array(select(jnp.array(pooled), density=0.6, causal=causal))
    np.testing.assert_array_equal(kept[0], np.eye(5, dtype=bool))
    assert kept[1].sum() == (9 if causal else 15)


def test_bad_grids_are_named():
    with pytest.raises(ValueError, match=r"pooled.shape=\(2, 3\)"):
        flood_fill(jnp.ones((2, 3)), quantile=0.5)
    with pytest.raises(ValueError, match="pooled.dtype=bool"):
        top_k_blocks(jnp.ones((3, 3), bool), density=0.5)
    with pytest.raises(ValueError, match="quantile=2"):
        flood_fill(jnp.ones((3, 3)), quantile=2)
