"""Blocks chosen from queries and keys: how many, which, and from what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks import DynamicBlocks
from sparsejax.masks.attention.block_counts import count_row_blocks
from sparsejax.masks.attention.dynamic import keep_top_blocks
from sparsejax.masks.attention.habits import (
    Habits,
    classify_distances,
    make_even_habits,
    predict_scores,
    remember,
)
from sparsejax.masks.attention.query_shares import compute_shares

HABITS = Habits(((0.1,) * 9,) * 4, (1.0,) * 4, (0.0,) * 4)
SIZE, NUM, HEADS, KV_HEADS, WIDTH = 8, 8, 4, 2, 16
LENGTH = SIZE * NUM


def make(**changes):
    options = {"density": 0.5, "block_size": SIZE, "num_blocks": NUM, "causal": True}
    return DynamicBlocks(**options | changes)


def draw(seed=0, *, length=LENGTH):
    keys = jax.random.split(jax.random.key(seed))
    shapes = ((2, length, HEADS, WIDTH), (2, length, KV_HEADS, WIDTH))
    # Scaled, so that attention is uneven.
    return [2 * jax.random.normal(*x) for x in zip(keys, shapes, strict=True)]


def choose(blocks, q, k, kv_mask=None):
    budget = jax.tree.map(lambda x: jnp.asarray(x[0]), blocks.budget(NUM, HEADS))
    return np.asarray(jax.jit(blocks)(q, k, kv_mask, budget))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_blocks", [1, 5, 8, 31])
@pytest.mark.parametrize("density", [0.3, 0.5, 0.77, 1.0])
def test_counts_add_up_to_the_density(num_blocks, density, causal):
    visible = np.arange(1, num_blocks + 1) if causal else np.full(num_blocks, num_blocks)
    total = round(density * visible.sum())
    if total < num_blocks:
        with pytest.raises(ValueError, match=f"density={density} must keep at least one"):
            count_row_blocks(num_blocks, density=density, causal=causal)
        return
    counts = count_row_blocks(num_blocks, density=density, causal=causal)
    assert counts.sum() == total and (counts >= 1).all() and (counts <= visible).all()
    assert np.ptp(counts[counts < visible]) <= 1 if (counts < visible).any() else True


@pytest.mark.parametrize("share_heads", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_exactly_so_many_visible_blocks_are_kept_with_diagonal_and_sink(causal, share_heads):
    blocks = make(causal=causal, share_heads=share_heads)
    kept = choose(blocks, *draw())
    counts = blocks.count(NUM, HEADS)[0]
    if share_heads:
        np.testing.assert_array_equal(kept.sum((1, 3)), np.tile(counts, (2, 1)))
        assert np.ptp(kept.sum((2, 3)), axis=1).max() > 0
    else:
        np.testing.assert_array_equal(kept.sum(3), np.tile(counts // HEADS, (2, HEADS, 1)))
    assert kept[..., 0].all() and kept[..., range(NUM), range(NUM)].all()
    assert not causal or not np.triu(kept, 1).any()
    assert kept.mean() == pytest.approx(
        blocks.measure_density(NUM, HEADS)[0] * (36 / 64 if causal else 1), abs=1e-6
    )


def test_what_lies_behind_the_first_position_of_a_query_block_does_not_choose_its_blocks():
    q, k = draw()
    blocks = make(num_queries=3, density=0.6)
    kept = choose(blocks, q, k)
    for row in (2, 5):
        first = row * SIZE
        pairs = zip((q, k), draw(1), strict=True)
        others = [x.at[:, first + 1 :].set(y[:, first + 1 :]) for x, y in pairs]
        changed = choose(blocks, *others)
        np.testing.assert_array_equal(changed[:, :, : row + 1], kept[:, :, : row + 1])
        assert (changed[:, :, row + 1 :] != kept[:, :, row + 1 :]).any()
    ahead = make(lookahead=True, num_queries=3, density=0.6)
    changed = choose(ahead, *others)
    assert (changed[:, :, :6] != choose(ahead, q, k)[:, :, :6]).any()


def test_a_block_that_the_first_query_asks_for_is_kept():
    q, k = draw()
    row, wanted = 4, 2
    k = k.at[:, wanted * SIZE + 2].set(3 * q[:, row * SIZE, ::2])
    blocks = make()
    assert choose(blocks, q, k)[:, ::2, row, wanted].all()
    assert not choose(blocks, *draw())[:, :, row, wanted].all()


def test_a_shorter_input_has_the_choice_of_the_longer_one():
    q, k = draw()
    blocks = make()
    short = choose(blocks, q[:, : 5 * SIZE], k[:, : 5 * SIZE])
    np.testing.assert_array_equal(short, choose(blocks, q, k)[:, :, :5, :5])


def test_keys_that_are_padding_have_no_share():
    q, k = draw()
    real = jnp.ones((2, LENGTH), bool).at[1, 20:].set(False)
    positions = np.arange(0, LENGTH, SIZE)[:, None]
    arguments = {"block_size": SIZE, "causal": False}
    scores = compute_shares(q[:, positions], k, positions, real, **arguments)[:, :, :, 0]
    np.testing.assert_allclose(scores.sum(-1), 1, rtol=1e-6)
    assert (scores[1, :, :, 3:] == 0).all() and (scores[0] > 0).all()
    softmax = jax.nn.softmax(
        jnp.einsum("inh,snh->nis", q[0, ::SIZE], jnp.repeat(k[0], 2, axis=1)) / WIDTH**0.5, -1
    )
    expected = softmax.reshape(HEADS, NUM, NUM, SIZE).sum(-1)
    np.testing.assert_allclose(scores[0], expected, rtol=1e-5)


@pytest.mark.parametrize("spacing", [2 * SIZE, 3 * SIZE])
def test_query_blocks_between_samples_have_the_last_ones_before(spacing):
    q, k = draw()
    every = make().look(q, k, None)
    spaced = make(query_spacing=spacing).look(q, k, None)
    rows = np.arange(NUM) // (spacing // SIZE) * (spacing // SIZE)
    np.testing.assert_allclose(spaced, every[:, :, rows], rtol=1e-5)


def test_without_samples_habits_alone_choose_whatever_the_input():
    blocks = make(num_queries=0)
    kept = choose(blocks, *draw())
    np.testing.assert_array_equal(kept, choose(blocks, *draw(1)))
    # Alike in all heads: what is nearest, beside the sink.
    many = make(num_queries=0, num_blocks=32, density=0.45)
    kept = np.asarray(
        many.keep(
            many.score(*draw(length=32 * SIZE), None, None), many.count(32, HEADS)[0], most=99
        )
    )
    for row in (12, 31):
        count = kept[0, :, row].sum(-1)
        assert np.ptp(count) <= 1
        for head in range(HEADS):
            nearest = [0, *range(row - count[head] + 2, row + 1)]
            assert kept[0, head, row, nearest].all()


def test_a_row_that_is_not_finite_changes_none_before_it():
    shares = np.tril(np.random.default_rng(0).random((1, 1, 4, 4))).astype(np.float32)
    expected = predict_scores(jnp.asarray(shares), num_sinks=1)
    shares[0, 0, 3] = np.nan
    scores = predict_scores(jnp.asarray(shares), num_sinks=1)
    np.testing.assert_array_equal(scores[:, :, :3], expected[:, :, :3])


def test_scores_add_up_what_is_known_of_a_head_and_what_it_saw():
    rng = np.random.default_rng(0)
    shares = np.tril(rng.random((1, 2, NUM, NUM))).astype(np.float32)
    habits = Habits(rng.random((2, 9)), np.array([2.0, 0.0]), np.array([0.5, 3.0]))
    scores = np.asarray(predict_scores(jnp.asarray(shares), habits, num_sinks=1))
    row, column, head = 7, 3, 0
    past = sum(0.3 * 0.7 ** (k - 1) * shares[0, head, row - k, column] ** 2 for k in range(1, 8))
    # Four blocks away: the fourth class.
    nearness = 1 + 1e-3 / (row - column)
    expected = (
        nearness * habits.distance_NC[head, 3] + 2 * shares[0, head, row, column] ** 2 + 0.5 * past
    )
    assert scores[0, head, row, column] == pytest.approx(expected, rel=1e-5)
    # Six blocks away is the fifth class; the first block behind the sink has its own beside it.
    expected = (1 + 1e-3 / 6) * (habits.distance_NC[1, 4] + habits.distance_NC[1, 8])
    past = np.asarray(remember(jnp.asarray(shares) ** 2))[0, 1, row, 1]
    assert scores[0, 1, row, 1] == pytest.approx(expected + 3 * past, rel=1e-5)
    changed = shares.copy()
    changed[:, :, 5:] = 0
    before = np.asarray(predict_scores(jnp.asarray(changed), habits, num_sinks=1))
    np.testing.assert_array_equal(before[:, :, :5], scores[:, :, :5])


def test_every_open_block_has_one_class_of_distance():
    classes = classify_distances(50, num_sinks=2)
    row, column = np.indices((50, 50))
    np.testing.assert_array_equal(classes[:-1].sum(0), (row > column) & (column >= 2))
    np.testing.assert_array_equal(classes[-1], (row > column) & (column == 2))
    # Of heads that nothing is known of, what is nearer is likelier.
    assert (np.diff(make_even_habits(1).distance_NC[0, :-1]) < 0).all()


def test_of_equal_scores_the_first_are_kept():
    visible = np.tri(4, dtype=bool)
    kept = keep_top_blocks(
        jnp.zeros((1, 2, 4, 4)),
        2 * np.array([1, 1, 2, 2]),
        always_IJ=np.eye(4, dtype=bool),
        visible_IJ=visible,
        most=4,
        shared=False,
    )
    expected = np.eye(4, dtype=bool)
    expected[2:, 0] = True
    np.testing.assert_array_equal(kept[0], np.stack([expected, expected]))


def test_layers_have_their_shares_of_an_exact_total():
    even, uneven = make(density=0.7), make(density=0.7, layer_shares=(1.0, 4.0, 0.1))
    total = 3 * even.count(NUM, HEADS)[0]
    counts = uneven.count(NUM, HEADS)
    np.testing.assert_array_equal(counts.sum(0), total)
    least, most = HEADS * np.minimum(np.arange(NUM) + 1, 2), HEADS * (np.arange(NUM) + 1)
    assert (least <= counts).all() and (counts <= most).all()
    assert (counts[1] >= counts[0]).all() and (counts[0] >= counts[2]).all()
    density = uneven.measure_density(NUM, HEADS)
    assert density.mean() == pytest.approx(even.measure_density(NUM, HEADS)[0])
    assert density[1] > density[0] > density[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"density": 0.2}, "density=0.2 must keep at least one of 8 blocks"),
        ({"density": 0.25}, "density must be enough for 1 sinks and a diagonal, got 0.25"),
        ({"num_queries": 9}, r"num_queries must be in \[0, block_size=8\], got 9"),
        ({"num_queries": 0, "causal": False}, r"num_queries must be in \[1, block_size=8\], got 0"),
        ({"query_spacing": 12}, "query_spacing must be a multiple of block_size=8, got 12"),
        ({"query_spacing": 16, "lookahead": True}, "query_spacing must be None where queries are"),
        ({"query_spacing": 16, "num_queries": 0}, "query_spacing must be None with num_queries=0"),
        ({"query_spacing": 72}, "query_spacing must be at most the 64 positions"),
        ({"query_spacing": 16.0}, "query_spacing must be a multiple of block_size=8, got 16.0"),
        ({"habits": (HABITS,), "lookahead": True}, r"habits must be \(\) where"),
        ({"habits": (HABITS,), "layer_shares": (1.0, 1.0)}, "habits must be of as many layers"),
        ({"layer_shares": (1.0, 0.0)}, "layer_shares must be positive"),
        ({"layer_shares": (1.0,), "share_heads": False}, r"must be \(\) without share_heads"),
        ({"causal": False, "lookahead": True}, "lookahead must be False without causal"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)
