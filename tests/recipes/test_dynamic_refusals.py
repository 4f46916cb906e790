"""What recipes of dynamic sparse training refuse, by name and value."""

import pytest

from sparsejax.patterns import NMPattern, Unstructured
from tests.recipes.test_dynamic import gradual_set, magnitude, mst, rigl, static_weights


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (mst, {"sparsity": 1.0}, r"recipe.mst: sparsity must be in \[0, 1\), .* got sparsity=1.0"),
        (mst, {"warmup": 0.9}, "leave an ultra-sparse phase between, got warmup=0.9, restoration"),
        (mst, {"stairs": 13}, "stairs must be at most the steps of the ramp, got stairs=13"),
        (mst, {"update_interval": 40}, "there must be an update, got none every interval=40"),
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
        (rigl, {"end_fraction": 1.5}, r"recipe.rigl: end_fraction must be in \(0, 1\], got .*1.5"),
        (rigl, {"update_fraction": 2.0}, r"fraction must be in \[0, 1\], got fraction=2.0"),
        (gradual_set, {"update_interval": 0}, "recipe.set: interval must be an int of at least 1"),
        (magnitude, {"start_fraction": 0.8}, "start_fraction must be .* below end_fraction, got"),
        (
            static_weights,
            {"sparsity": -0.1},
            "recipe.static_weights: initial_sparsity must be in .* got initial_sparsity=-0.1",
        ),
        (
            static_weights,
            {"layer_density": "er"},
            "recipe.static_weights: method must be .* got method='er'",
        ),
        (
            rigl.__wrapped__,
            {"patterns": {}},
            "sparse_weights must name at least one",
        ),
        (
            rigl.__wrapped__,
            {"patterns": {"mlp/up": NMPattern()}},
            "sparsity must be 0.5, that of the pattern '2:4', got sparsity=0.8",
        ),
        (
            mst.__wrapped__,
            {"patterns": {"mlp/up": NMPattern()}},
            r"where the sparsity changes while training, got \{'mlp/up': '2:4'\}",
        ),
        (
            static_weights.__wrapped__,
            {"sparsity": 0.5, "patterns": {"a": NMPattern(), "b": Unstructured()}},
            "sparse_weights must be one n:m pattern, not transposable, or none of n:m, got",
        ),
    ],
)
def test_settings_out_of_range_are_refused(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)
