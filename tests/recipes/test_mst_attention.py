"""The hybrid attention of MST: by phase, of blocks or of positions."""

import jax
import numpy as np
import pytest

from sparsejax.masks import hybrid_blocks
from sparsejax.recipes import get_attention_masks
from tests.recipes.test_dynamic import L, begin, masks_of, mst


def test_attention_is_hybrid_in_the_ultra_sparse_phase():
    recipe = mst(attention_stride=32, attention_blocks=True)
    assert [(p.name, p.sparse_attention, p.last_step) for p in recipe.phases] == [
        ("warm-up", False, 12),
        ("ultra-sparse", True, 28),
        ("restoration", False, None),
    ]
    sparsity, _ = begin(recipe)
    inside = recipe.enter_phase(sparsity, recipe.phases[1])
    expected = hybrid_blocks(5, block=16, stride=32)
    assert 0 < expected.sum() < 15
    for layer in range(L):
        np.testing.assert_array_equal(get_attention_masks(inside.masks)[layer], expected)
    after = recipe.enter_phase(inside, recipe.phases[2])
    assert get_attention_masks(after.masks).all()
    jax.tree.map(np.testing.assert_array_equal, masks_of(after), masks_of(sparsity))
    assert not any(phase.sparse_attention for phase in mst().phases)


def test_hybrid_attention_is_of_positions_as_published():
    recipe = mst(attention_stride=3)
    dense, sparse, restored = recipe.phases
    assert (dense.sparse_attention, restored.sparse_attention) == (False, False)
    i, j = np.indices((80, 80))
    expected = (i >= j) & ((i - j < 3) | ((i - j) % 3 == 0))
    np.testing.assert_array_equal(sparse.position_mask(80), expected)
    sparsity, _ = begin(recipe)
    inside = recipe.enter_phase(sparsity, sparse)
    assert get_attention_masks(inside.masks).all(), "blocks have no part in it"


@pytest.mark.parametrize("blocks", [False, True])
def test_hybrid_attention_may_stay_to_the_end(blocks):
    recipe = mst(attention_stride=32, attention_blocks=blocks, restore_attention=False)
    _, sparse, restored = recipe.phases
    assert restored == sparse._replace(name="restoration", last_step=None)
    sparsity, _ = begin(recipe)
    inside = recipe.enter_phase(sparsity, sparse)
    after = recipe.enter_phase(inside, restored)
    kept = get_attention_masks(inside.masks)
    np.testing.assert_array_equal(get_attention_masks(after.masks), kept)
    assert kept.all() != blocks
