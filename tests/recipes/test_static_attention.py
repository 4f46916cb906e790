"""Fixed patterns: when they apply, how much they keep; and the masks that recipes write."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks import FIXED_PATTERNS, pattern_at_density
from sparsejax.recipes import (
    StaticAttentionConfig,
    compute_attention_density,
    get_attention_masks,
    make_dense,
    make_static_attention,
    set_attention_masks,
)

BASE = StaticAttentionConfig(
    pattern="bigbird", density=0.5, num_layers=3, num_blocks=8, num_steps=100
)
MASKS = {"blocks": {"attention": {"block_mask": jnp.ones((3, 1, 1, 8, 8), bool)}}}


def test_without_dense_steps_the_pattern_applies_from_the_start():
    recipe = make_static_attention(BASE)
    (phase,) = recipe.phases
    assert (phase.name, phase.sparse_attention, phase.pruned_logits) == ("sparse", True, "masked")
    key = jax.random.key(3)
    sparsity = recipe.init(MASKS, {}, key)
    expected = pattern_at_density("bigbird", 8, density=0.5, key=key)
    for layer in get_attention_masks(sparsity.masks):
        np.testing.assert_array_equal(layer, expected)


def test_after_dense_steps_the_pattern_applies_in_the_second_phase():
    recipe = make_static_attention(
        dataclasses.replace(BASE, dense_fraction=0.2, pruned_logits="zero")
    )
    dense, sparse = recipe.phases
    assert (dense.name, dense.sparse_attention, dense.last_step) == ("dense", False, 20)
    assert (sparse.name, sparse.sparse_attention, sparse.last_step) == ("sparse", True, None)
    assert sparse.pruned_logits == "zero"
    sparsity = recipe.init(MASKS, {}, jax.random.key(3))
    assert get_attention_masks(sparsity.masks).all()
    at_once = make_static_attention(BASE).init(MASKS, {}, jax.random.key(3))
    later = recipe.enter_phase(sparsity, sparse, previous=recipe.phases[0])
    np.testing.assert_array_equal(*(get_attention_masks(s.masks) for s in (later, at_once)))


@pytest.mark.parametrize("pattern", FIXED_PATTERNS)
@pytest.mark.parametrize("causal", [False, True])
def test_the_density_is_the_one_asked_for(pattern, causal):
    config = dataclasses.replace(BASE, pattern=pattern, causal=causal)
    sparsity = make_static_attention(config).init(MASKS, {}, jax.random.key(0))
    np.testing.assert_array_equal(compute_attention_density(sparsity.masks, causal=causal), 0.5)
    if causal:
        masks = get_attention_masks(sparsity.masks)
        np.testing.assert_array_equal(masks, jnp.tril(masks))


@pytest.mark.ci
def test_the_number_of_sinks_is_a_setting():
    config = dataclasses.replace(BASE, pattern="sink_window", num_sinks=2)
    sparsity = make_static_attention(config).init(MASKS, {}, jax.random.key(0))
    (mask, *_) = np.asarray(get_attention_masks(sparsity.masks))
    assert mask[:, :2].all() and mask.sum() == 32


def test_the_key_decides_the_random_blocks():
    def masks(seed):
        sparsity = make_static_attention(BASE).init(MASKS, {}, jax.random.key(seed))
        return np.asarray(get_attention_masks(sparsity.masks))

    np.testing.assert_array_equal(masks(0), masks(0))
    assert (masks(0) != masks(1)).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"pattern": "strided"},
            "pattern must be one of ('sliding_window', 'sink_window', 'longformer', 'bigbird', "
            "'random'), got 'strided'",
        ),
        (
            {"density": 0.1},
            "density must be in [0.125, 1], the diagonal being kept always, got 0.1",
        ),
        (
            {"pattern": "sink_window", "num_sinks": 9},
            "num_sinks must be in 1 to 8, the blocks along one side, got 9",
        ),
        (
            {"num_sinks": 2},
            "num_sinks must be 1 with pattern='bigbird', which has no use for it, got 2",
        ),
        ({"dense_fraction": -1}, "dense_fraction must be in [0, 1), got -1"),
        (
            {"dense_fraction": 0.999},
            "dense_fraction must be small enough to leave a sparse step of 100, got 0.999",
        ),
        ({"pruned_logits": "one"}, "pruned_logits must be 'masked' or 'zero', got 'one'"),
        ({"num_layers": 0}, "num_layers must be positive, got 0"),
        ({"num_blocks": 0}, "num_blocks must be positive, got 0"),
    ],
    ids=str,
)
def test_a_bad_setting_is_named(settings, message):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(BASE, **settings)
    assert str(error.value) == f"recipe.static_attention.{message}"


def test_the_smallest_density_keeps_the_diagonal():
    for causal, smallest in ((False, 1 / 8), (True, 2 / 9)):
        config = dataclasses.replace(BASE, density=smallest, causal=causal)
        sparsity = make_static_attention(config).init(MASKS, {}, jax.random.key(0))
        np.testing.assert_array_equal(get_attention_masks(sparsity.masks)[0], np.eye(8))


def test_patterns_go_into_block_masks_layer_by_layer_and_nowhere_else():
    pattern = np.random.default_rng(0).random((3, 8, 8)) < 0.5
    other = jnp.ones((3, 4), bool)
    masks = {"attention": {"block_mask": jnp.ones((3, 1, 1, 8, 8), bool)}, "mlp": {"up": other}}
    changed = set_attention_masks(masks, jnp.asarray(pattern))
    np.testing.assert_array_equal(get_attention_masks(changed), pattern)
    assert changed["mlp"]["up"] is other
    assert get_attention_masks(masks).all()
    np.testing.assert_allclose(
        compute_attention_density(changed, causal=False), pattern.mean((1, 2))
    )


def test_a_pattern_that_does_not_fit_is_refused():
    expected = r"\['block_mask'\], got pattern.shape=\(2, 8, 8\) for mask.shape=\(3, 1, 1, 8, 8\)"
    with pytest.raises(ValueError, match=expected):
        set_attention_masks(MASKS, jnp.ones((2, 8, 8), bool))
    with pytest.raises(ValueError, match="one leaf called 'block_mask', got 0"):
        get_attention_masks({})


def test_the_dense_recipe_never_prunes():
    (phase,) = make_dense().phases
    assert not phase.sparse_attention and phase.probe_every_steps is None
    assert make_dense().init(MASKS, {}, jax.random.key(0)).masks is MASKS
