"""The static patterns: their definitions, and exact counts at a requested density."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks import (
    bigbird,
    block_density,
    hybrid_blocks,
    hybrid_mask,
    longformer,
    pattern_at_density,
    sink_window,
    sliding_window,
)

FAMILIES = ["sliding_window", "sink_window", "longformer", "bigbird", "random"]


def visible_blocks(num_blocks, causal):
    return np.array([[j <= i or not causal for j in range(num_blocks)] for i in range(num_blocks)])


@pytest.mark.parametrize("causal", [False, True])
def test_window_and_globals_are_where_the_definitions_say(causal):
    visible = visible_blocks(12, causal)
    window = np.array([[abs(i - j) < 3 for j in range(12)] for i in range(12)])
    globals_ = np.array([[i < 2 or j < 2 for j in range(12)] for i in range(12)])
    np.testing.assert_array_equal(sliding_window(12, width=3, causal=causal), window & visible)
    np.testing.assert_array_equal(
        longformer(12, width=3, num_global=2, causal=causal), (window | globals_) & visible
    )


@pytest.mark.parametrize("causal", [pytest.param(False, marks=pytest.mark.ci), True])
def test_sinks_are_seen_by_every_block_and_see_no_more_than_others(causal):
    expected = [
        [(abs(i - j) < 3 or j < 2) and (j <= i or not causal) for j in range(12)] for i in range(12)
    ]
    mask = np.array(sink_window(12, width=3, num_sinks=2, causal=causal))
    np.testing.assert_array_equal(mask, expected)
    # What the definition keeps is what its own density gives.
    density = float(block_density(jnp.asarray(mask), causal=causal))
    again = pattern_at_density("sink_window", 12, density=density, causal=causal, num_sinks=2)
    np.testing.assert_array_equal(again, expected)


def test_a_count_between_two_windows_fills_the_next_diagonal_from_its_first_block():
    # The diagonal, ten more sinks of the first column and two of the sub-diagonal's ten others.
    mask = np.array(pattern_at_density("sink_window", 12, density=25 / 78, causal=True))
    assert mask.sum() == 25 and mask[:, 0].all()
    beside = mask & ~np.eye(12, dtype=bool)
    beside[:, 0] = False
    assert np.argwhere(beside).tolist() == [[2, 1], [3, 2]]
    # Too few for the whole column: the blocks that no window reaches come first.
    mask = np.array(pattern_at_density("sink_window", 12, density=15 / 78, causal=True))
    assert np.argwhere(mask & ~np.eye(12, dtype=bool)).tolist() == [[9, 0], [10, 0], [11, 0]]


@pytest.mark.parametrize("causal", [False, True])
def test_bigbird_adds_random_blocks_to_each_row(causal):
    fixed = np.array(longformer(12, width=2, num_global=1, causal=causal))
    draws = [
        np.array(
            bigbird(12, width=2, num_global=1, num_random=3, key=jax.random.key(s), causal=causal)
        )
        for s in range(20)
    ]
    free = (visible_blocks(12, causal) & ~fixed).sum(axis=1)
    for mask in draws:
        assert (mask | ~fixed).all()
        np.testing.assert_array_equal((mask & ~fixed).sum(axis=1), np.minimum(free, 3))
        assert not (mask & ~visible_blocks(12, causal)).any()
    ever_drawn = np.any(draws, axis=0)
    assert (ever_drawn == visible_blocks(12, causal)).mean() > 0.9


@pytest.mark.ci
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_count_from_diagonal_to_dense_is_met_exactly(name, causal):
    visible = visible_blocks(12, causal)
    for count in range(12, visible.sum() + 1, 3):
        # The density of a measured mask, rounded to f32, must give back its count.
        density = float(np.float32(count) / np.float32(visible.sum()))
        mask = np.array(
            pattern_at_density(name, 12, density=density, causal=causal, key=jax.random.key(0))
        )
        assert mask.dtype == np.bool_ and mask.sum() == count
        assert mask.diagonal().all()
        assert not (mask & ~visible).any()


@pytest.mark.ci
def test_a_pattern_matches_a_measured_density():
    measured = longformer(12, width=2, num_global=1, causal=True)
    density = float(block_density(measured, causal=True))
    mask = pattern_at_density("sliding_window", 12, density=density, causal=True)
    assert mask.sum() == measured.sum()


def test_window_widens_from_the_diagonal():
    full_band = sliding_window(12, width=3)
    density = float(block_density(full_band))
    np.testing.assert_array_equal(
        pattern_at_density("sliding_window", 12, density=density), full_band
    )
    mask = np.array(pattern_at_density("sliding_window", 12, density=density + 2 / 144))
    added = np.argwhere(mask & ~np.array(full_band))
    assert added.tolist() == [[0, 3], [1, 4]]


def test_parts_take_their_shares():
    # 44 beside the diagonal: 22 globals are the first row and column.
    density = (12 + 44) / 144
    mask = np.array(pattern_at_density("longformer", 12, density=density))
    assert mask[0].all() and mask[:, 0].all()
    window = mask[1:, 1:]
    assert window.sum() == 11 + 22
    assert (np.abs(np.subtract(*np.nonzero(window))) <= 2).all()

    keys = [jax.random.key(0), jax.random.key(1)]
    first, second = (
        np.array(pattern_at_density("bigbird", 12, density=density, key=k)) for k in keys
    )
    assert first[0, -7:].all() and first[-7:, 0].all()
    far = np.abs(np.subtract.outer(np.arange(12), np.arange(12))) > 3
    far[0] = far[:, 0] = False
    assert 3 < (first & far).sum() <= 14
    assert (first & far != second & far).any()
    again = pattern_at_density("bigbird", 12, density=density, key=keys[0])
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("causal", [False, True])
def test_random_blocks_lie_anywhere_beside_the_diagonal(causal):
    visible = visible_blocks(8, causal)
    draw = functools.partial(pattern_at_density, "random", 8, density=0.5, causal=causal)
    share = np.mean([draw(key=jax.random.key(s)) for s in range(100)], axis=0)
    assert (share.diagonal() == 1).all()
    # Each of the others is as likely; ± .2 is four standard deviations.
    beside = share[visible & ~np.eye(8, dtype=bool)]
    expected = (visible.sum() / 2 - 8) / len(beside)
    np.testing.assert_allclose(beside, expected, atol=0.2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("stride", [1, 3, 5, 40])
def test_hybrid_attention_is_local_or_strided(stride, causal):
    expected = [
        [
            (abs(i - j) < stride or (i - j) % stride == 0) and (j <= i or not causal)
            for j in range(24)
        ]
        for i in range(24)
    ]
    mask = np.array(hybrid_mask(24, stride=stride, causal=causal))
    assert mask.dtype == np.bool_
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(
    ("stride", "share"),
    [
        (128, 24.11),
        *(pytest.param(*p, marks=pytest.mark.ci) for p in ((64, 13.57), (32, 9.17), (16, 9.25))),
    ],
)
def test_hybrid_attention_keeps_known_shares_of_causal_pairs(stride, share):
    kept = 100 * hybrid_mask(1024, stride=stride).sum() / (1024 * 1025 / 2)
    np.testing.assert_allclose(kept, share, atol=0.005)


@pytest.mark.parametrize("causal", [pytest.param(False, marks=pytest.mark.ci), True])
def test_hybrid_blocks_cover_the_mask_and_nothing_else(causal):
    for block in (1, 3, 8):
        for stride in range(1, 40, 3):
            mask = np.array(hybrid_mask(9 * block, stride=stride, causal=causal))
            cover = mask.reshape(9, block, 9, block).any((1, 3))
            blocks = hybrid_blocks(9, block=block, stride=stride, causal=causal)
            np.testing.assert_array_equal(blocks, cover)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hybrid_mask(0, stride=4), "length=0"),
        (lambda: hybrid_mask(8, stride=0), "stride=0"),
        (lambda: hybrid_blocks(8, block=0, stride=4), "block=0"),
        (lambda: sliding_window(0, width=1), "num_blocks=0"),
        (lambda: sliding_window(4, width=0), "width=0"),
        (lambda: longformer(4, width=1, num_global=-1), "num_global=-1"),
        (lambda: sink_window(4, width=1, num_sinks=-1), "num_sinks=-1"),
        (lambda: pattern_at_density("sink_window", 4, density=0.5, num_sinks=5), "num_sinks=5"),
        (
            lambda: bigbird(4, width=1, num_global=0, num_random=-2, key=jax.random.key(0)),
            "num_random=-2",
        ),
        (lambda: pattern_at_density("reformer", 4, density=0.5), "name='reformer'"),
        (lambda: pattern_at_density("bigbird", 4, density=0.5), "key=None"),
        (lambda: pattern_at_density("random", 4, density=0.5), "key=None"),
        (lambda: pattern_at_density("longformer", 4, density=0.2), "density=0.2"),
        (lambda: pattern_at_density("longformer", 4, density=float("nan")), "density=nan"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
