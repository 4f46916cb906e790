"""The recipe whose attention blocks are chosen from the input: its phases and settings."""

import pytest

from configs import base
from sparsejax.config.parse import ConfigError, parse_config
from sparsejax.recipes.attention.dynamic_attention import (
    DynamicAttentionConfig,
    make_dynamic_attention,
)

SIZES = {
    "block_size": 16,
    "num_layers": 2,
    "length": 128,
    "num_heads": 2,
    "head_dim": 8,
    "num_steps": 20,
}


def parse(**settings):
    config = base.get_config()
    config.recipe.name = "dynamic_attention"
    for name, value in settings.items():
        config.update_from_flattened_dict({f"recipe.dynamic_attention.{name}": value})
    return parse_config(config.to_dict())


@pytest.mark.parametrize("dense_phase", ["spion", "sat"])
def test_a_published_dense_phase_ends_in_chosen_blocks(dense_phase):
    config = DynamicAttentionConfig(dense_phase=dense_phase, density=0.5, **SIZES)
    dense, sparse = make_dynamic_attention(config).phases
    assert not dense.sparse_attention and dense.choose_blocks is None
    assert sparse.sparse_attention and sparse.choose_blocks == config.make_chooser()
    assert sparse.pruned_logits == "masked"


@pytest.mark.parametrize("setting", [{"query_spacing": 128}, {"num_queries": 0}], ids=str)
def test_settings_of_causal_models_are_taken_before_the_task_is_known(setting):
    assert parse(density=0.5, **setting).recipe.settings.items() >= setting.items()


def test_what_no_task_can_use_is_refused_before_data_is_read():
    with pytest.raises(ConfigError, match="query_spacing must be a multiple of block_size"):
        parse(query_spacing=100)
