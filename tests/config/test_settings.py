"""Bad settings are refused before anything starts, by name, value and expectation."""

import dataclasses
import importlib
import math
import pathlib
import re

import pytest

from configs import base, gpt2, llama, mst_small, spion
from sparsejax.config.parse import (
    ConfigError,
    describe_unused,
    find_differences,
    list_settings,
    parse_config,
)
from sparsejax.config.schema import make_transformer_config
from sparsejax.recipes import Phase, Recipe
from sparsejax.recipes.registry import RECIPES, RecipeEntry


def _settings(**changes):
    config = base.get_config()
    for key, value in changes.items():
        config.update_from_flattened_dict({key.replace("__", "."): value})
    return config.to_dict()


def test_defaults_are_valid():
    config = parse_config(_settings())
    assert config.recipe.name == "dense"
    assert config.data.sequence_length == 1024


def test_every_setting_has_a_meaning():
    assert [setting.name for setting in list_settings() if not setting.meaning] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, r"num_steps must be at least 1, got 0"),
        ({"model__num_heads": 3}, r"model.model_dim must be a multiple of num_heads=3, got 128"),
        ({"model__num_kv_heads": 3}, r"model.num_kv_heads must be a divisor of num_heads=4, got 3"),
        (
            {"model__block_size": 60},
            r"model.block_size must be a positive divisor of data.sequence_length=1024, got 60",
        ),
        (
            {
                "recipe__name": "static_attention",
                "recipe__static_attention__dense_fraction": 0.9999,
            },
            r"dense_fraction must be small enough to leave a sparse step of 1000, got 0.9999",
        ),
        (
            {"num_steps": 1200, "schedule_steps": 1000, "optimizer__schedule": "triangle"},
            r"num_steps must be at most schedule_steps=1000, at whose end the rate of 'triangle' is"
            " 0, got 1200",
        ),
        ({"model__dtype": "float64"}, r"model.dtype must be one of .*, got 'float64'"),
        ({"model__dropout_rate": 1.0}, r"model.dropout_rate must be in \[0, 1\), got 1.0"),
        (
            {"model__attention_implementation": "cuda"},
            r"model.attention_implementation must be one of .*, got 'cuda'",
        ),
        (
            {"model__attention_implementation": "xla"},
            r"model.attention_implementation must be None in recipe 'dense', .*, got 'xla'",
        ),
        (
            {"model__weight_implementation": "dense"},
            r"model.weight_implementation must be one of .*'reference', 'xla'\), got 'dense'",
        ),
        ({"data__source": "wikipedia"}, r"data.source='wikipedia': expected one of"),
        ({"data__batch_size": 0}, r"data.batch_size=0: expected an integer in \[1, 2147"),
        (
            {"num_micro_batches": 3},
            r"num_micro_batches must be a divisor of data.batch_size=8, got 3",
        ),
        ({"optimizer__learning_rate": -1.0}, r"optimizer.learning_rate must be positive, got -1.0"),
        ({"optimizer__schedule": "step"}, r"optimizer.schedule must be one of .*, got 'step'"),
        ({"recipe__name": "lottery"}, r"recipe.name must be one of .*, got 'lottery'"),
        ({"recipe__name": "spion"}, r"recipe.spion.quantile must be in \(0, 1\) .*, got None"),
        (
            {"recipe__name": "spion", "recipe__spion__quantile": 1.5},
            r"recipe.spion.quantile must be in \(0, 1\) .*, got 1.5",
        ),
        (
            {"recipe__name": "spion", "recipe__spion__variant": "c"},
            r"recipe.spion.density must be in .*, got None",
        ),
        (
            {"recipe__name": "static_attention", "recipe__static_attention__density": 0.0},
            r"recipe.static_attention.density must be in .*, got 0.0",
        ),
        ({"checkpoint__keep_last": 0}, r"checkpoint.keep_last must be at least 1, got 0"),
        (
            {"recipe__name": "fst", "model__mlp_dim": 510},
            r"'mlp/up' with the pattern '2:4 transposable' must be a multiple of 4 by .*, 510\]",
        ),
        (
            {"recipe__name": "sste", "model__mlp_dim": 510},
            r"'mlp/down' with the pattern '2:4' must be a multiple of 4 by .* got \[510, 128\]",
        ),
        (
            {"recipe__name": "fst", "recipe__fst__sparse_weights": "mlp/.*=2:5"},
            r"'mlp/up' with the pattern '2:5' must be a multiple of 5 by .* got \[128, 512\]",
        ),
        (
            {"recipe__name": "fst", "recipe__fst__sparse_weights": "mlp/.*=1:4 transposable"},
            r"recipe.fst.patterns must be '2:4 transposable' where transposable",
        ),
        (
            {"recipe__name": "mst", "recipe__mst__sparse_weights": "mlp/.*=24x24"},
            r"'mlp/up' with the pattern '24x24' must be a multiple of 24 by a multiple of 24",
        ),
        (
            {"optimizer__schedule": "one_cycle", "optimizer__initial_fraction": 0.5},
            r"initial_fraction must be 0.0 with schedule='one_cycle', which has no use for it",
        ),
        ({"optimizer__name": "sgd", "optimizer__b2": 0.5}, r"b2 must be 0.95 with name='sgd'"),
        (
            {"recipe__name": "spion", "recipe__spion__variant": "f", "recipe__spion__quantile": 0.9}
            | {"recipe__spion__filter_size": 5},
            r"recipe.spion.filter_size must be 31 with variant='f', which has no use for it, got 5",
        ),
        (
            {"recipe__name": "mst", "recipe__mst__growth": "random", "recipe__mst__mix": 5},
            r"recipe.mst.mix must be 3 with growth='random', which has no use for it, got 5",
        ),
    ],
)
def test_value_out_of_range_is_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(_settings(**changes))


def test_no_number_is_infinite_or_too_large_for_a_device():
    numbers = [setting for setting in list_settings() if setting.type in (int, float)]
    assert len(numbers) > 60
    for name, kind, *_ in numbers:
        section, _, rest = name.partition(".")
        method = rest.partition(".")[0] if section == "recipe" else "dense"
        for value in (2**63,) if kind is int else (math.inf, math.nan, 1e39):
            changes = {"recipe__name": method, name.replace(".", "__"): value}
            with pytest.raises(
                ConfigError, match=rf"{name}.*got {re.escape(repr(value))}|{name}={value}"
            ):
                parse_config(_settings(**changes))


_CONFIGS = {path.stem for path in pathlib.Path(base.__file__).parent.glob("*.py")}
_SIZES = {f"{name}:{size}" for name in ("gpt2", "fst_gpt2", "sste_gpt2") for size in gpt2.SIZES}
_SIZES |= {f"spion:{task}" for task in spion.TASKS} | {f"llama:{size}" for size in llama.SIZES}


@pytest.mark.parametrize("name", sorted(_CONFIGS - {"__init__", "lra"} | _SIZES))
def test_shipped_configs_are_valid(name):
    module, _, size = name.partition(":")
    settings = importlib.import_module(f"configs.{module}").get_config(*filter(None, [size]))
    settings = settings.to_dict()
    assert parse_config(settings).recipe.name == settings["recipe"]["name"]
    # The number of steps alone makes a run short.
    for num_steps in (10, 100):
        parse_config(settings | {"num_steps": num_steps})


@pytest.mark.parametrize("weights", ["embedding=unstructured", ".*/.*=8x8; embedding=4x8"])
def test_an_embedding_may_be_named(weights):
    # Only a model with a tied head has one that is multiplied, which the data decides.
    config = mst_small.get_config()
    config.recipe.mst.sparse_weights = weights
    parse_config(config.to_dict())


def test_clipping_may_be_off():
    parse_config(_settings(optimizer__clip_norm=None, optimizer__clip_value=None))


def test_published_densities_of_encoders_are_accepted():
    config = spion.get_config("image")
    config.recipe.spion.update(variant="c", density=0.04, quantile=None)
    parse_config(config.to_dict())


def test_unknown_key_is_named_with_the_nearest_known_one():
    settings = _settings()
    settings["model"]["num_layer"] = 3
    with pytest.raises(ConfigError, match=r"unknown key model.num_layer; .*num_layers"):
        parse_config(settings)


def test_missing_section_and_key_are_named():
    settings = _settings(recipe__name="spion")
    del settings["recipe"]["spion"]
    with pytest.raises(ConfigError, match=r"missing key recipe.spion"):
        parse_config(settings)
    settings = _settings()
    del settings["optimizer"]["b1"]
    with pytest.raises(ConfigError, match=r"missing key optimizer.b1"):
        parse_config(settings)


def test_what_is_set_of_other_recipes_is_named():
    config = mst_small.get_config()
    assert describe_unused(config.to_dict()).startswith(
        "note: recipe 'mst' has no use for what is set of magnitude (rate_exponent, "
    )
    settings = _settings(recipe__name="sat+fst", recipe__sat__density=0.3)
    assert not describe_unused(settings)
    settings["recipe"]["name"] = "fst"
    assert describe_unused(settings).endswith("what is set of sat (density)")


def test_a_section_of_another_recipe_has_known_keys_too():
    settings = _settings(recipe__name="dense")
    settings["recipe"]["fst"] = {"decay": 1e-4}
    with pytest.raises(ConfigError, match=r"unknown key recipe.fst.decay; did you mean .*decay_"):
        parse_config(settings)
    settings["recipe"]["fst"] = 0.5
    with pytest.raises(ConfigError, match=r"recipe.fst must be a mapping, got 0.5"):
        parse_config(settings)


def test_wrong_type_is_named():
    settings = _settings()
    settings["model"]["num_layers"] = 2.5
    with pytest.raises(ConfigError, match=r"model.num_layers must be of type int, got 2.5"):
        parse_config(settings)


def test_vocabulary_smaller_than_the_data_is_refused():
    config = parse_config(_settings(model__vocab_size=100))
    with pytest.raises(ValueError, match=r"model.vocab_size must be .* 256 token ids .*, got 100"):
        make_transformer_config(config, task="language_model", vocab_size=256, num_classes=0)


def test_differences_name_both_values():
    old, new = _settings(), _settings(optimizer__b1=0.8, num_steps=7)
    assert find_differences(old, new) == ["num_steps: 1000 -> 7", "optimizer.b1: 0.9 -> 0.8"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OwnConfig:
    """Settings of a method of one's own.

    Attributes:
      strength: how much.
    """

    strength: float = 0.5
    num_steps: int


def test_a_recipe_is_a_class_a_function_and_a_row(monkeypatch):
    made = []

    def make(config):
        made.append(config)
        return Recipe("toy", (Phase("toy"),))

    monkeypatch.setitem(RECIPES, "toy", RecipeEntry("toy", _OwnConfig, make, ("num_steps",)))
    settings = base.get_config()
    settings.num_steps = 700
    settings.recipe.name = "toy"
    settings.recipe.toy.strength = 2  # an int, where a float is expected
    assert "how much" in base.describe_settings(["recipe.toy"])
    config = parse_config(settings.to_dict())
    assert made == [_OwnConfig(strength=2.0, num_steps=700)]
    assert config.to_dict()["recipe"] == {"name": "toy", "toy": {"strength": 2.0}}
    assert parse_config(config.to_dict()) == config
