"""MST: mixed growth, hybrid attention in the ultra-sparse phase, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks import hybrid_blocks
from sparsejax.patterns import NMPattern
from sparsejax.recipes import get_attention_masks, set_attention_masks
from tests.recipes.two_weights import L, begin, draw, make_update, masks_of, mst


def test_mst_grows_three_by_gradient_for_one_at_random():
    recipe = mst()
    sparsity, params = begin(recipe)
    update = make_update(recipe)
    for step in range(13):
        sparsity, params, _ = update(sparsity, params, (), draw(step), jnp.int32(step))
    # At step 15 the sparsity rests. Gradients that are largest in one row.
    before, grads = masks_of(sparsity), draw(0)
    free = jnp.asarray(~before["mlp/down"])
    grads["blocks"]["mlp"]["down"]["kernel"] = jnp.where(free, 1.0, 0.0).at[:, 10:].multiply(0.5)
    after, _, _ = update(sparsity, params, (), grads, jnp.int32(15))
    grown = masks_of(after)["mlp/down"] & ~before["mlp/down"]
    lower = grown[:, 10:].sum((1, 2))
    total = int(before["mlp/down"][0].sum() * 0.15 * (1 + np.cos(np.pi * 3 / 16)))
    assert total >= 4
    # Some dropped ones may return at random; those by gradient never are dropped ones here.
    by_gradient = grown[:, :10].sum((1, 2))
    assert (by_gradient >= total * 3 // 4).all() and (lower <= total - total * 3 // 4).all()


def test_attention_is_hybrid_in_the_ultra_sparse_phase():
    recipe = mst(attention_stride=32, attention_blocks=True)
    assert [(p.name, p.sparse_attention, p.last_step) for p in recipe.phases] == [
        ("warm-up", False, 12),
        ("ultra-sparse", True, 28),
        ("restoration", False, None),
    ]
    sparsity, _ = begin(recipe)
    inside = recipe.enter_phase(sparsity, recipe.phases[1], previous=recipe.phases[0])
    expected = hybrid_blocks(5, block=16, stride=32)
    assert 0 < expected.sum() < 15
    for layer in range(L):
        np.testing.assert_array_equal(get_attention_masks(inside.masks)[layer], expected)
    after = recipe.enter_phase(inside, recipe.phases[2], previous=recipe.phases[0])
    assert get_attention_masks(after.masks).all()
    jax.tree.map(np.testing.assert_array_equal, masks_of(after), masks_of(sparsity))
    assert not any(phase.sparse_attention for phase in mst().phases)


def test_without_attention_of_its_own_it_leaves_that_of_another_recipe():
    recipe = mst()
    sparsity, _ = begin(recipe)
    pattern = np.broadcast_to(np.eye(5, dtype=bool), (L, 5, 5))
    masks = set_attention_masks(sparsity.masks, pattern)
    kept = dataclasses.replace(sparsity, masks=masks)
    for phase in recipe.phases[1:]:
        after = recipe.enter_phase(kept, phase, previous=recipe.phases[0])
        np.testing.assert_array_equal(get_attention_masks(after.masks), pattern)


def test_hybrid_attention_is_of_positions_as_published():
    recipe = mst(attention_stride=3)
    dense, sparse, restored = recipe.phases
    assert (dense.sparse_attention, restored.sparse_attention) == (False, False)
    i, j = np.indices((80, 80))
    expected = (i >= j) & ((i - j < 3) | ((i - j) % 3 == 0))
    np.testing.assert_array_equal(sparse.position_mask(80), expected)
    sparsity, _ = begin(recipe)
    inside = recipe.enter_phase(sparsity, sparse, previous=recipe.phases[0])
    assert get_attention_masks(inside.masks).all(), "blocks have no part in it"


@pytest.mark.parametrize("blocks", [False, True])
def test_hybrid_attention_may_stay_to_the_end(blocks):
    recipe = mst(attention_stride=32, attention_blocks=blocks, restore_attention=False)
    _, sparse, restored = recipe.phases
    assert restored == sparse._replace(name="restoration", last_step=None)
    sparsity, _ = begin(recipe)
    inside = recipe.enter_phase(sparsity, sparse, previous=recipe.phases[0])
    after = recipe.enter_phase(inside, restored, previous=recipe.phases[0])
    kept = get_attention_masks(inside.masks)
    np.testing.assert_array_equal(get_attention_masks(after.masks), kept)
    assert kept.all() != blocks


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (mst, {"sparsity": 1.0}, r"recipe.mst: sparsity must be in \[0, 1\), .* got sparsity=1.0"),
        (mst, {"warmup": 0.9}, "leave an ultra-sparse phase between, got warmup=0.9, restoration"),
        (mst, {"stairs": 0}, "stairs must be an int of at least 1, got stairs=0"),
        (
            mst,
            {"update_interval_fraction": 1.0},
            r"update_interval_fraction must be in \(0, 1\), got 1",
        ),
        (mst, {"mix": 0}, "recipe.mst: mix must be at least 1, got mix=0"),
        (
            mst,
            {"attention_stride": 24, "attention_blocks": True},
            "multiple of the attention block, 16 .* got attention_stride=24",
        ),
        (mst, {"attention_stride": 80}, "below the sequence length 80, got attention_stride=80"),
        (
            mst,
            {"restore_attention": False},
            "restore_attention must be True without an attention_st",
        ),
        (mst, {"attention_blocks": True}, "attention_blocks must be False without an attention_st"),
        (
            mst.__wrapped__,
            {"patterns": {"mlp/up": NMPattern()}},
            r"where the sparsity changes while training, got \{'mlp/up': '2:4'\}",
        ),
    ],
)
def test_settings_out_of_range_are_refused(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)
