"""Dropping and growing: against sorting in NumPy, over whole runs of updates, and on blocks."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks import (
    apply_topology,
    block_scores,
    count_kept,
    drop_and_grow,
    expand_blocks,
    random_mask,
    reset_moments,
    update_counts,
)

SHAPE = (8, 12)
SIZE = 96
LAYERS = 3


def take_largest(x, count, among):
    candidates = np.flatnonzero(among)
    order = candidates[np.argsort(-np.abs(x).ravel()[candidates], kind="stable")]
    mask = np.zeros(x.size, bool)
    mask[order[:count]] = True
    return mask.reshape(x.shape)


def sort_oracle(mask, weight, grad, num_drop, num_grow):
    """Return what is kept, and what of the rest grows by gradient."""
    kept = take_largest(weight, mask.sum() - num_drop, mask)
    return kept, take_largest(grad, num_grow, ~kept)


def make_layer(seed, ties=False):
    rng = np.random.default_rng(seed)
    mask = rng.random(SHAPE) < rng.random()
    draw = functools.partial(rng.integers, -2, 3) if ties else rng.standard_normal
    weight, grad = (np.array(draw(size=SHAPE), np.float32) for _ in range(2))
    return mask, weight * mask, grad


counts = st.integers(0, SIZE)
fractions = st.floats(0, 1, width=32, allow_subnormal=False)


@hypothesis.given(seed=st.integers(0, 2**32 - 1), ties=st.booleans(), drop=counts, grow=counts)
def test_gradient_growth_is_that_of_sorting(seed, ties, drop, grow):
    mask, weight, grad = make_layer(seed, ties)
    drop = min(drop, mask.sum())
    grow = min(grow, SIZE - mask.sum() + drop)
    new = drop_and_grow(
        jnp.array(mask),
        weight=jnp.array(weight),
        grad=jnp.array(grad),
        num_drop=drop,
        num_grow=grow,
    )
    kept, grown = sort_oracle(mask, weight, grad, drop, grow)
    np.testing.assert_array_equal(new, kept | grown)
    assert new.sum() == mask.sum() - drop + grow


@pytest.mark.parametrize("mix", [3, *(pytest.param(m, marks=pytest.mark.ci) for m in (1, 4))])
def test_mixed_growth_has_its_share_of_each(mix):
    mask, weight, grad = make_layer(5)
    drop = int(mask.sum()) // 2
    update = functools.partial(
        drop_and_grow, jnp.array(mask), weight=jnp.array(weight), grad=jnp.array(grad)
    )
    for grow in range(0, 40, 3):
        by_gradient = grow * mix // (mix + 1)
        options = {"num_drop": drop, "num_grow": grow, "growth": "mixed", "mix": mix}
        keys = jax.random.split(jax.random.key(grow), 30)
        news = np.array(jax.vmap(lambda key, o=options: update(**o, key=key))(keys))
        kept, grown = sort_oracle(mask, weight, grad, drop, by_gradient)
        np.testing.assert_array_equal(news.sum((1, 2)), kept.sum() + grow)
        # No key changes what grows by gradient, and nothing else is in all 30 draws.
        np.testing.assert_array_equal(news.all(0), kept | grown)
        np.testing.assert_array_equal(news[0], update(**options, key=keys[0]))


@pytest.mark.ci
def test_the_random_part_is_fair_among_what_is_left():
    mask, weight, grad = make_layer(5)
    drop = int(mask.sum()) // 2
    keys = jax.random.split(jax.random.key(0), 3000)
    for growth, by_gradient in (("mixed", 18), ("random", 0)):
        update = functools.partial(
            drop_and_grow, jnp.array(mask), weight=jnp.array(weight), grad=jnp.array(grad)
        )
        update = functools.partial(update, num_drop=drop, num_grow=24, growth=growth)
        frequency = np.array(jax.vmap(lambda key, f=update: f(key=key))(keys)).mean(0)
        kept, grown = sort_oracle(mask, weight, grad, drop, by_gradient)
        np.testing.assert_array_equal(frequency[kept | grown], 1)
        left = ~(kept | grown)
        expected = (24 - by_gradient) / left.sum()
        tolerance = 5 * (expected * (1 - expected) / 3000) ** 0.5
        np.testing.assert_allclose(frequency[left], expected, atol=tolerance)
        # The chance of entries just dropped is that of all others.
        assert (left & mask).sum() > 5


def test_a_just_dropped_entry_may_grow_again_and_keeps_its_value():
    mask = jnp.array([True, True, True, False])
    weight, grad = jnp.array([5.0, 1, 3, 0]), jnp.array([0.0, 9, 0, 1])
    new = drop_and_grow(mask, weight=weight, grad=grad, num_drop=1, num_grow=2)
    np.testing.assert_array_equal(new, [True, True, True, True])
    np.testing.assert_array_equal(apply_topology(weight, mask, new), [5, 1, 3, 0])
    np.testing.assert_array_equal(reset_moments(weight + 1, mask, new), [6, 2, 4, 0])


@pytest.mark.parametrize(
    "growth", ["mixed", *(pytest.param(g, marks=pytest.mark.ci) for g in ("gradient", "random"))]
)
def test_counts_beyond_what_there_is_are_clamped(growth):
    mask, weight, grad = make_layer(1)
    update = functools.partial(
        drop_and_grow, jnp.array(mask), weight=jnp.array(weight), grad=jnp.array(grad)
    )
    update = functools.partial(update, growth=growth, key=jax.random.key(0))
    assert update(num_drop=10**6, num_grow=0).sum() == 0
    assert update(num_drop=0, num_grow=10**6).all()
    assert update(num_drop=10**6, num_grow=10**6).all()
    np.testing.assert_array_equal(update(num_drop=-3, num_grow=-3), mask)


@pytest.mark.parametrize(
    "growth", ["mixed", *(pytest.param(g, marks=pytest.mark.ci) for g in ("gradient", "random"))]
)
def test_nothing_but_ties_still_gives_exact_counts(growth):
    mask = jnp.array(make_layer(2)[0])
    update = functools.partial(drop_and_grow, mask, growth=growth, key=jax.random.key(0))
    for weight, grad in ((0.0, 0.0), (2.0, -1.0), (np.nan, np.nan)):
        constant = {"weight": jnp.full(SHAPE, weight), "grad": jnp.full(SHAPE, grad)}
        new = update(**constant, num_drop=7, num_grow=12)
        assert new.sum() == mask.sum() + 5


def test_nan_stays_and_grows():
    mask = jnp.array([True, True, False, False])
    weight, grad = jnp.array([jnp.nan, 1, 0, 0]), jnp.array([0, 0, 5, jnp.nan])
    new = drop_and_grow(mask, weight=weight, grad=grad, num_drop=1, num_grow=1)
    np.testing.assert_array_equal(new, [True, False, False, True])


@functools.cache
def make_update(growth):
    """Return one update of three layers in one compiled function, and the list of its traces."""
    traces = []

    @jax.jit
    def update(masks, weights, key, density, fraction):
        traces.append(growth)
        old_counts = masks.sum((1, 2))
        num_drop, num_grow = update_counts(
            old_counts, size=SIZE, density=density, update_fraction=fraction
        )
        grad_key, growth_key = jax.random.split(key)
        grads = jax.random.normal(grad_key, masks.shape).round()

        def one(mask, weight, grad, num_drop, num_grow, key):
            return drop_and_grow(
                mask,
                weight=weight,
                grad=grad,
                num_drop=num_drop,
                num_grow=num_grow,
                growth=growth,
                key=key,
            )

        keys = jax.random.split(growth_key, LAYERS)
        new = jax.vmap(one)(masks, weights, grads, num_drop, num_grow, keys)
        # As a step of training would: grown weights move away from zero.
        weights = apply_topology(weights, masks, new)
        return new, jnp.where(new, weights - 0.1 * grads, 0)

    return update, traces


@hypothesis.settings(max_examples=12)
@hypothesis.given(
    seed=st.integers(0, 2**31 - 1),
    schedule=st.lists(
        st.tuples(st.lists(fractions, min_size=3, max_size=3), fractions),
        min_size=1,
        max_size=8,
    ),
)
@pytest.mark.ci
@pytest.mark.parametrize("growth", ["gradient", "random", "mixed"])
def test_any_run_of_updates_has_exact_counts_in_one_program(growth, seed, schedule):
    update, traces = make_update(growth)
    key = jax.random.key(seed)
    masks = jax.vmap(lambda key: random_mask(key, SHAPE, 40))(jax.random.split(key, LAYERS))
    weights = masks.astype(jnp.float32)
    for index, (densities, fraction) in enumerate(schedule):
        densities = jnp.array(densities, jnp.float32)
        state = (masks, weights, jax.random.fold_in(key, index), densities, jnp.float32(fraction))
        new_masks, new_weights = update(*state)
        np.testing.assert_array_equal(new_masks.sum((1, 2)), count_kept(SIZE, densities))
        assert not (np.array(new_weights) * ~np.array(new_masks)).any()
        masks, weights = new_masks, new_weights
    for first, again in zip((masks, weights), update(*state), strict=True):
        np.testing.assert_array_equal(first, again)
    assert len(traces) == 1


@pytest.mark.ci
def test_mapped_layers_are_those_alone():
    layers = [make_layer(seed, ties=True) for seed in range(LAYERS)]
    masks, weights, grads = (jnp.stack(x) for x in map(list, zip(*layers, strict=True)))
    keys = jax.random.split(jax.random.key(0), LAYERS)
    drops, grows = masks.sum((1, 2)) // jnp.array([2, 3, 4]), jnp.array([0, 9, 17])

    def one(mask, weight, grad, num_drop, num_grow, key):
        counts = {"num_drop": num_drop, "num_grow": num_grow}
        return drop_and_grow(mask, weight=weight, grad=grad, **counts, growth="mixed", key=key)

    together = jax.vmap(one)(masks, weights, grads, drops, grows, keys)
    for index, new in enumerate(together):
        alone = one(*(x[index] for x in (masks, weights, grads, drops, grows, keys)))
        np.testing.assert_array_equal(new, alone)


def test_new_weights_start_at_zero_and_others_stay():
    rng = np.random.default_rng(0)
    old, new = (rng.random((2, *SHAPE)) < 0.5 for _ in range(2))
    # What a mask hides may be anything.
    weight = rng.standard_normal(old.shape).astype(np.float32)
    weight[~old] = np.nan
    after = np.array(apply_topology(jnp.array(weight), jnp.array(old), jnp.array(new)))
    np.testing.assert_array_equal(after, np.where(old & new, weight, 0))


def test_moments_of_grown_weights_are_zeroed_or_stale():
    rng = np.random.default_rng(0)
    old, new = (rng.random(SHAPE) < 0.5 for _ in range(2))
    moment = rng.standard_normal(SHAPE).astype(np.float32)
    moments = {"up": {"kernel": jnp.array(moment), "bias": jnp.ones(3)}}
    olds, news = ({"up": {"kernel": jnp.array(mask), "bias": None}} for mask in (old, new))
    zeroed = jax.jit(reset_moments)(moments, olds, news)
    np.testing.assert_array_equal(zeroed["up"]["kernel"], np.where(new & ~old, 0, moment))
    np.testing.assert_array_equal(zeroed["up"]["bias"], 1)
    stale = reset_moments(moments, olds, news, rule="stale")
    np.testing.assert_array_equal(stale["up"]["kernel"], moment)


def test_grown_weights_may_begin_with_the_mean_moment_of_their_layer():
    moment = jnp.array([[[1.0, 3, 100]], [[5.0, 6, 7]]])
    old = jnp.array([[[True, True, False]], [[False, False, False]]])
    new = jnp.array([[[True, False, True]], [[True, False, False]]])
    after = reset_moments(moment, old, new, rule="mean")
    # Of a layer that kept nothing there is no mean.
    np.testing.assert_array_equal(after, [[[1, 3, 2]], [[0, 6, 7]]])


def test_trees_of_weights_keep_leaves_without_a_mask():
    old = {"up": jnp.array([True, False]), "norm": None}
    new = {"up": jnp.array([True, True]), "norm": None}
    weights = {"up": jnp.array([3.0, 4], jnp.bfloat16), "norm": jnp.array([5.0])}
    after = apply_topology(weights, old, new)
    assert after["up"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(after["up"].astype(float), [3, 0])
    np.testing.assert_array_equal(after["norm"], [5])


def test_blocks_are_scored_dropped_and_grown_as_wholes():
    rng = np.random.default_rng(0)
    weight, grad = (rng.integers(-8, 9, (2, 8, 12)).astype(np.float32) for _ in range(2))
    expected = np.abs(weight).reshape(2, 4, 2, 3, 4).sum((2, 4))
    scores = block_scores(jnp.array(weight, jnp.bfloat16), (2, 4))
    assert scores.dtype == jnp.float32
    np.testing.assert_array_equal(scores, expected)

    mask = jnp.array(rng.random((2, 4, 3)) < 0.6)
    grad_scores = block_scores(jnp.array(grad), (2, 4))
    new = jax.vmap(
        lambda mask, w, g: drop_and_grow(mask, weight=w, grad=g, num_drop=2, num_grow=3)
    )(mask, scores, grad_scores)
    for layer in range(2):
        kept, grown = sort_oracle(
            *(np.array(x[layer]) for x in (mask, scores, grad_scores)), num_drop=2, num_grow=3
        )
        np.testing.assert_array_equal(new[layer], kept | grown)
    expanded = np.array(expand_blocks(new, (2, 4)))
    np.testing.assert_array_equal(expanded, np.kron(np.array(new), np.ones((1, 2, 4), bool)))


def test_block_sums_of_half_precision_are_f32():
    x = jnp.full((64, 64), 1.0, jnp.bfloat16)
    assert block_scores(x, (64, 64)) == 4096
    assert block_scores(x * 1.0078125, (64, 64)) == 4128


MASK = np.ones((2, 4), bool)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": jnp.ones((2, 4))}, r"mask must be bool\[2, 4\], got float32"),
        ({"weight": jnp.ones((2, 3))}, r"weight must be floating\[2, 4\] .*=float32\[2, 3\]"),
        ({"weight": jnp.ones((2, 4), int)}, r"weight must be floating.*=int32"),
        ({"grad": jnp.ones((4, 2))}, r"grad must be floating\[2, 4\] .*=float32\[4, 2\]"),
        ({"grad": None}, "grad=None"),
        ({"num_drop": 1.5}, "num_drop must be an integer scalar"),
        ({"num_grow": jnp.array([1, 2])}, r"num_grow must be .* int32\[2\]"),
        ({"growth": "mixed"}, "key must be given for growth='mixed', got key=None"),
        ({"growth": "random"}, "key must be given for growth='random'"),
        ({"growth": "momentum"}, "growth='momentum'"),
        ({"mix": 0}, "mix=0"),
        ({"mix": 2.5}, "mix=2.5"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "mask": jnp.array(MASK),
        "weight": jnp.ones((2, 4)),
        "grad": jnp.ones((2, 4)),
        "num_drop": 1,
        "num_grow": 1,
    }
    with pytest.raises(ValueError, match=message):
        drop_and_grow(**(arguments | change))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, w: apply_topology(w, m, w), r"new_mask must be bool\[2, 4\], got float32"),
        (lambda m, w: apply_topology(w, m[0], m), r"old_mask must be .* got bool\[4\]"),
        (lambda m, w: apply_topology({"a": w}, {"a": m}, {"a": None}), "new_mask must not be None"),
        (lambda m, w: apply_topology({"a": w}, {"b": m}, {"b": m}), "a"),
        (lambda m, w: reset_moments(w, m, m, rule="old"), "rule='old'"),
        (lambda m, w: reset_moments(w, w, m), "old_mask must be"),
        (lambda m, w: block_scores(m, (2, 2)), "x.dtype=bool"),
        (lambda m, w: block_scores(w, (2, 3)), r"block=\(2, 3\) for x.shape=\(2, 4\)"),
        (lambda m, w: block_scores(w, (0, 2)), r"block=\(0, 2\)"),
        (lambda m, w: block_scores(w[0], (1, 2)), r"x.shape=\(4,\)"),
        (lambda m, w: expand_blocks(w, (2, 2)), r"mask must be bool\[..., I, J\], got float32"),
        (lambda m, w: expand_blocks(m, (2, 0)), r"block=\(2, 0\)"),
    ],
)
def test_bad_masks_and_blocks_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.array(MASK), jnp.ones((2, 4)))
