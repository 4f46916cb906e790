"""Pruned models are trained through the masks that a training says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.pretrained_recovery import Text, train
from sparsejax.calibration import set_weight_masks
from sparsejax.masks import transposable_mask
from sparsejax.models import SparsityMask
from sparsejax.patterns import NMPattern
from sparsejax.recipes.dense import make_dense
from sparsejax.training.state import merge_model
from tests.small_models import make_config, make_small_optimizer, make_state

DENSE = make_dense()


@pytest.mark.ci
@pytest.mark.parametrize("training", ["fixed masks", "FST"])
def test_masks_stay_or_are_searched_by_magnitude(training):
    config = make_config(sparse_weights=(("mlp/up", NMPattern(2, 4, transposable=True)),))
    state = make_state(config, DENSE, make_small_optimizer())
    model = merge_model(config, state.params, state.sparsity.masks)
    scores = jax.random.uniform(jax.random.key(1), (2, 16, 32))
    pruned = set_weight_masks(model, {"mlp/up": transposable_mask(scores)})
    batches = np.random.default_rng(0).integers(0, 17, (10, 2, 17), np.int32)
    old = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(pruned)))
    trained, losses = train(pruned, Text(batches, ""), training=training, learning_rate=1e-3)
    assert len(losses) == 10
    w, mask = (
        nnx.to_pure_dict(nnx.state(trained, kind))["blocks"]["mlp"]["up"][name]
        for kind, name in ((nnx.Param, "kernel"), (SparsityMask, "kernel_mask"))
    )
    expected = transposable_mask(scores if training == "fixed masks" else jnp.asarray(w))
    np.testing.assert_array_equal(mask, expected)
    assert not np.array_equal(w, old["blocks"]["mlp"]["up"]["kernel"])
    # What was trained from is still there.
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(pruned)), old)
