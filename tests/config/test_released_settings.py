"""Published configs follow the released code where it can be followed; ours keep our defaults."""

import importlib

import pytest

from sparsejax.config.parse import list_settings, parse_config

_LRA = {
    "model.linear_init": "torch",
    "model.init_std": None,
    "model.mlp_activation": "gelu_exact",
    "model.dropout_rate": 0.1,
    "model.mlp_dropout_rate": 0.1,
    "optimizer.schedule": "torch_one_cycle",
    "optimizer.cycle_momentum": True,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.999,
}
_GPT2 = {
    "model.mlp_activation": "gelu_exact",
    "model.use_bias": False,
    "model.use_norm_bias": False,
    "model.init_std": 0.02,
    "optimizer.decay_embeddings": "all",
    "optimizer.weight_decay": 0.1,
}
_RELEASED = {
    "spion:listops": _LRA | {"optimizer.late_schedule": True},
    "sat:image": _LRA
    | {
        "optimizer.late_schedule": False,
        "recipe.sat.pattern_init_scale": 1.0,
        "recipe.sat.pattern_rate_scale": 1.0,
    },
    "gpt2:124m": _GPT2,
    "fst_gpt2:774m": _GPT2
    | {"recipe.fst.grad_pruning": "mvue", "recipe.fst.sr_ste_decay": "gradients"},
    "sste_gpt2:124m": _GPT2 | {"recipe.sste.grad_pruning": "mvue"},
    "mst_gpt2": _GPT2 | {"model.mlp_activation": "gelu", "optimizer.decay_embeddings": "none"},
    "fst_bert": {
        "model.mlp_activation": "geglu",
        "model.use_bias": False,
        "model.use_norm_bias": True,
        "optimizer.decay_embeddings": "tokens",
        "recipe.fst.grad_pruning": "mvue",
    },
    "fst_deit": {
        "model.mlp_activation": "gelu_exact",
        "model.use_bias": True,
        "optimizer.decay_embeddings": "tokens",
        "recipe.fst.grad_pruning": "mvue",
    },
    "fst_transformer_base": {
        "model.mlp_activation": "relu",
        "model.use_bias": True,
        "recipe.fst.grad_pruning": "mvue",
    },
}
_OURS = (
    "quickstart",
    "copying",
    "dense_small",
    "spion_small",
    "sat_quickstart",
    "fst_small",
    "fashion_mnist",
    "mst_small",
)
_OPTIONS = {setting for settings in _RELEASED.values() for setting in settings} - {
    "model.dropout_rate",
    "optimizer.b2",
    "optimizer.schedule",
    "optimizer.weight_decay",
}


def _read(name):
    module, _, part = name.partition(":")
    return importlib.import_module(f"configs.{module}").get_config(*filter(None, [part])).to_dict()


def _get(settings, name):
    for part in name.split("."):
        settings = settings[part]
    return settings


@pytest.mark.parametrize("name", _RELEASED)
def test_a_published_config_follows_the_released_code(name):
    settings = _read(name)
    parse_config(settings)
    assert {key: _get(settings, key) for key in _RELEASED[name]} == _RELEASED[name]


@pytest.mark.parametrize("name", _OURS)
def test_a_config_of_ours_keeps_our_defaults(name):
    settings = _read(name)
    defaults = {setting.name: setting.default for setting in list_settings()}
    assert {key: _get(settings, key) for key in _OPTIONS} == {
        key: defaults[key] for key in _OPTIONS
    }
    assert not settings["optimizer"]["schedule"].startswith("torch")
