"""SPION's rules: hand-worked grids, a plain NumPy telling of them, and their invariants."""

import functools
import math

import hypothesis
import hypothesis.extra.numpy as hypothesis_numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks import (
    block_density,
    flood_fill,
    flood_reach,
    pool_attention,
    spion_pattern,
    top_k_blocks,
)


def pool_oracle(attention, *, block_size, filter_size, causal=False):
    length = len(attention)
    attention = np.tril(attention) if causal else attention
    convolved = np.zeros((length, length))
    for t in range(length):
        for s in range(length):
            for k in range(-(filter_size // 2), filter_size // 2 + 1):
                if 0 <= t + k < length and 0 <= s + k < length:
                    convolved[t, s] += attention[t + k, s + k]
    blocks = range(0, length, block_size)
    return np.array(
        [[convolved[i : i + block_size, j : j + block_size].mean() for j in blocks] for i in blocks]
    )


def walk_oracle(padded, threshold, row, column, kept):
    size = len(kept)
    if row >= size or column >= size:
        return
    down, right = padded[row + 1, column], padded[row, column + 1]
    diagonal = padded[row + 1, column + 1]
    if down > right:
        step = (1, 0) if down > diagonal else (1, 1)
    else:
        step = (0, 1) if right > diagonal else (1, 1)
    row, column = row + step[0], column + step[1]
    if row < size and column < size and padded[row, column] > threshold:
        kept[row, column] = True
    walk_oracle(padded, threshold, row, column, kept)


def flood_fill_oracle(pooled, *, quantile, causal=False):
    size = len(pooled)
    starts = [(0, c) for c in range(size)] + [(r, 0) for r in range(size)]
    values = pooled
    if causal:
        starts = [(c, c) for c in range(size)] + [(r, 0) for r in range(size)]
        values = pooled[np.tril_indices(size)]
        pooled = np.tril(pooled)
    threshold = np.quantile(values.astype(np.float64), quantile)
    kept = np.zeros((size, size), bool)
    for row, column in starts:
        walk_oracle(np.pad(pooled, (0, 1)), threshold, row, column, kept)
    return kept | np.eye(size, dtype=bool)


def flood_oracle(pooled, *, threshold, causal):
    """Spread from block to block, as water does; starts spread whether they are kept or not."""
    size = len(pooled)
    visible = np.tril(np.ones((size, size), bool)) if causal else np.ones((size, size), bool)
    starts = [(i, i) if causal else (0, i) for i in range(size)] + [(i, 0) for i in range(size)]
    kept = np.zeros((size, size), bool)
    wet = list(starts)
    for start in starts:
        kept[start] = pooled[start] > threshold
    while wet:
        row, column = wet.pop()
        for i, j in ((row + 1, column), (row, column + 1), (row + 1, column + 1)):
            if max(i, j) < size and visible[i, j] and not kept[i, j] and pooled[i, j] > threshold:
                kept[i, j] = True
                wet.append((i, j))
    return kept | np.eye(size, dtype=bool)


def draw_causal_maps(size, layers=3):
    """Pooled maps like those of decoders: a sink, a heavy diagonal, and noise elsewhere."""
    noise = np.random.default_rng(size).random((layers, size, size), np.float32)
    distance = np.subtract.outer(np.arange(size), np.arange(size))
    maps = noise + 2 * (np.arange(size) == 0) + 4 * np.exp(-distance.clip(0) / 2)
    return np.tril(maps).astype(np.float32)


def top_k_oracle(pooled, *, density, causal=False):
    size = len(pooled)
    visible = np.tril(np.ones((size, size), bool)) if causal else np.ones((size, size), bool)
    largest_first = sorted(zip(*np.nonzero(visible), strict=True), key=lambda ij: -pooled[ij])
    kept = np.eye(size, dtype=bool)
    for block in largest_first[: int(np.floor(visible.sum() * density - size))]:
        kept[block] = True
    return kept


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


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "filter_size", [5, *(pytest.param(n, marks=pytest.mark.ci) for n in (1, 8 * 2 - 1, 31))]
)
def test_pooling_equals_the_double_loop(filter_size, causal):
    attention = np.random.default_rng(1).random((24, 24), np.float32)
    pooled = pool_attention(
        jnp.array(attention), block_size=4, filter_size=filter_size, causal=causal
    )
    expected = pool_oracle(attention, block_size=4, filter_size=filter_size, causal=causal)
    np.testing.assert_allclose(pooled, expected, rtol=1e-6)


def test_pooling_without_filter_is_the_block_mean():
    attention = np.random.default_rng(2).random((2, 12, 12), np.float32)
    pooled = pool_attention(jnp.array(attention), block_size=3, filter_size=None)
    np.testing.assert_allclose(pooled, attention.reshape(2, 4, 3, 4, 3).mean((2, 4)), rtol=1e-6)


@pytest.mark.ci
def test_pooling_needs_little_memory_beside_the_map():
    attention = jax.ShapeDtypeStruct((2, 1024, 1024), jnp.float32)
    compiled = pool_attention.lower(attention, block_size=64, filter_size=31).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * 2 * 1024**2 * 4


@pytest.mark.parametrize("causal", [pytest.param(False, marks=pytest.mark.ci), True])
@pytest.mark.parametrize(
    "variant", ["cf", *(pytest.param(v, marks=pytest.mark.ci) for v in ("c", "f"))]
)
def test_pattern_is_pooling_then_selection(variant, causal):
    logits = np.random.default_rng(3).normal(size=(3, 48, 48)).astype(np.float32)
    attention = np.array(jax.nn.softmax(2 * logits, axis=-1))
    density = 0.4 if variant == "c" else None
    kept = spion_pattern(
        jnp.array(attention),
        block_size=6,
        quantile=0.8,
        filter_size=5,
        variant=variant,
        density=density,
        causal=causal,
    )
    assert kept.shape == (3, 8, 8) and kept.dtype == jnp.bool_
    for layer in range(3):
        pooled = pool_oracle(
            attention[layer], block_size=6, filter_size=1 if variant == "f" else 5, causal=causal
        )
        if density is None:
            expected = flood_fill_oracle(pooled, quantile=0.8, causal=causal)
            if causal:
                threshold = np.quantile(pooled[np.tril_indices(8)], 0.8)
                expected = flood_oracle(pooled, threshold=threshold, causal=True)
        else:
            expected = top_k_oracle(pooled, density=density, causal=causal)
        np.testing.assert_array_equal(kept[layer], expected)
    if causal:
        assert not np.triu(kept, 1).any()


@pytest.mark.ci
@pytest.mark.parametrize("variant", ["cf", "c"])
def test_layers_are_independent_and_compilation_changes_nothing(variant):
    options = dict(block_size=3, quantile=0.6, filter_size=3, variant=variant)
    options |= {"density": 0.5} if variant == "c" else {}
    attention = jnp.array(np.random.default_rng(4).random((3, 12, 12), np.float32))
    kept = spion_pattern(attention, **options)
    order = np.array([2, 0, 1])
    np.testing.assert_array_equal(spion_pattern(attention[order], **options), kept[order])
    with jax.disable_jit():
        np.testing.assert_array_equal(spion_pattern(attention, **options), kept)


@pytest.mark.parametrize(
    "select",
    [flood_fill, pytest.param(functools.partial(top_k_blocks, exact=True), marks=pytest.mark.ci)],
)
@pytest.mark.parametrize("causal", [pytest.param(False, marks=pytest.mark.ci), True])
def test_a_density_of_a_map_with_a_nan_keeps_its_diagonal_alone(select, causal):
    pooled = np.random.default_rng(5).random((2, 5, 5), np.float32)
    pooled[0, 4, 1] = np.nan
    kept = np.array(select(jnp.array(pooled), density=0.6, causal=causal))
    np.testing.assert_array_equal(kept[0], np.eye(5, dtype=bool))
    assert kept[1].sum() == (9 if causal else 15)


@pytest.mark.parametrize("variant", ["cf", "c"])
def test_a_layer_with_a_nan_keeps_its_diagonal_alone(variant):
    attention = np.random.default_rng(5).random((2, 20, 20), np.float32)
    options = dict(block_size=4, quantile=0.6, filter_size=3, variant=variant)
    options |= {"density": 0.5} if variant == "c" else {}
    healthy = np.array(spion_pattern(jnp.array(attention), **options))
    attention[0, 7, 3] = np.nan
    kept = np.array(spion_pattern(jnp.array(attention), **options))
    np.testing.assert_array_equal(kept[0], np.eye(5, dtype=bool))
    np.testing.assert_array_equal(kept[1], healthy[1])


@pytest.mark.ci
def test_half_precision_maps_are_accumulated_in_f32():
    attention = jnp.array(np.random.default_rng(6).random((24, 24)), jnp.bfloat16)
    options = dict(block_size=4, filter_size=5)
    pooled = pool_attention(attention, **options)
    assert pooled.dtype == jnp.float32
    np.testing.assert_array_equal(pooled, pool_attention(attention.astype("float32"), **options))


@pytest.mark.parametrize(
    "density", [0.5, *(pytest.param(d, marks=pytest.mark.ci) for d in (1 / 7, 1.0))]
)
@pytest.mark.parametrize("causal", [False, True])
def test_top_k_takes_the_largest_beside_the_diagonal(density, causal):
    density = max(density, 7 / 28) if causal else density
    pooled = np.random.default_rng(7).random((7, 7), np.float32)
    kept = top_k_blocks(jnp.array(pooled), density=density, causal=causal)
    np.testing.assert_array_equal(kept, top_k_oracle(pooled, density=density, causal=causal))


@pytest.mark.parametrize("causal", [pytest.param(False, marks=pytest.mark.ci), True])
def test_exact_top_k_keeps_as_many_blocks_of_every_head(causal):
    pooled = np.random.default_rng(7).random((2, 3, 7, 7), np.float32)
    kept = np.array(top_k_blocks(jnp.array(pooled), density=0.5, causal=causal, exact=True))
    count = 14 if causal else 25
    np.testing.assert_array_equal(kept.sum((2, 3)), count)
    beside = np.where(np.eye(7, dtype=bool), -1, np.tril(pooled) if causal else pooled)
    for values, chosen in zip(beside.reshape(6, -1), kept.reshape(6, -1), strict=True):
        assert chosen[np.argsort(-values)[: count - 7]].all()
    assert kept.diagonal(axis1=2, axis2=3).all() and not (causal and np.triu(kept, 1).any())


SQUARE = jnp.ones((8, 8))


@pytest.mark.parametrize(
    ("attention", "options", "message"),
    [
        (SQUARE, {"quantile": 1.0}, "quantile=1.0"),
        (SQUARE, {"quantile": float("nan")}, "quantile=nan"),
        (SQUARE, {"quantile": 1.0, "variant": "c", "density": 0.5}, "quantile=1.0"),
        (SQUARE, {"block_size": 3}, "block_size=3 for length=8"),
        (SQUARE, {"block_size": 0}, "block_size=0"),
        (SQUARE, {"filter_size": 4}, "filter_size=4"),
        (SQUARE, {"variant": "fc"}, "variant='fc'"),
        (SQUARE, {"variant": "c"}, "density=None"),
        (SQUARE, {"density": 0.5}, "quantile=0.9 and density=0.5"),
        (SQUARE, {"quantile": None}, "quantile=None and density=None"),
        (SQUARE, {"quantile": None, "density": 0.2}, "density=0.2"),
        (SQUARE, {"walk": "drunken"}, "walk='drunken'"),
        (SQUARE, {"variant": "c", "density": 0.2}, "density=0.2"),
        (SQUARE, {"variant": "c", "density": float("nan")}, "density=nan"),
        (jnp.ones((8, 4)), {}, r"attention.shape=\(8, 4\)"),
        (jnp.ones((8, 8), int), {}, "attention.dtype=int32"),
    ],
)
def test_bad_input_is_named(attention, options, message):
    with pytest.raises(ValueError, match=message):
        spion_pattern(attention, **{"block_size": 2, "quantile": 0.9} | options)


def test_bad_grids_are_named():
    with pytest.raises(ValueError, match=r"pooled.shape=\(2, 3\)"):
        flood_fill(jnp.ones((2, 3)), quantile=0.5)
    with pytest.raises(ValueError, match="pooled.dtype=bool"):
        top_k_blocks(jnp.ones((3, 3), bool), density=0.5)
    with pytest.raises(ValueError, match="quantile=2"):
        flood_fill(jnp.ones((3, 3)), quantile=2)
