"""Warnings about settings that do not suit a pretrained model."""

import pytest

from configs import base
from sparsejax.config.parse import parse_config
from sparsejax.config.pretrained import warn_of_zero_rule


def read_recipe(**changes):
    config = base.get_config()
    config.recipe.spion.quantile = 0.9
    with config.recipe.unlocked():
        config.recipe.update_from_flattened_dict(changes)
    return parse_config(config.to_dict()).recipe


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"name": "spion"}, "recipe.spion.pruned_logits"),
        ({"name": "sat+fst"}, "recipe.sat.pruned_logits"),
        (
            {"name": "static_attention", "static_attention.pruned_logits": "zero"},
            "recipe.static_attention.pruned_logits",
        ),
        ({"name": "spion", "spion.pruned_logits": "masked"}, None),
        ({"name": "static_attention"}, None),
        ({"name": "fst"}, None),
        ({"name": "dense"}, None),
    ],
    ids=str,
)
def test_the_zero_rule_is_named_where_a_pretrained_model_is_pruned(changes, setting):
    recipe = read_recipe(**changes)
    warning = warn_of_zero_rule(recipe, pretrained=True)
    if setting is None:
        assert warning is None
    else:
        assert warning.startswith(f"{setting}='zero' ") and warning.endswith("set it to 'masked'")
    assert warn_of_zero_rule(recipe, pretrained=False) is None
