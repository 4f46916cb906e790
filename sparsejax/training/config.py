"""From the mapping a user edits to frozen, checked settings; the only reader of that mapping."""

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Mapping
from typing import Any

from sparsejax.models import Implementation, TransformerConfig
from sparsejax.patterns import BlockPattern
from sparsejax.recipes import (
    Recipe,
    SpionConfig,
    StaticAttentionConfig,
    make_dense,
    make_spion,
    make_static_attention,
)
from sparsejax.training.data import DataConfig
from sparsejax.training.optimizer import OptimizerConfig, make_optimizer

_RECIPES = ("dense", "spion", "static_attention")


class ConfigError(ValueError):
    """A setting that a user has to change: the message names key, value and expectation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The part of a model that does not follow from the data; see `configs/base.py`.

    Attributes are the keys of `model` there, in the same units.
    """

    vocab_size: int
    num_layers: int
    model_dim: int
    num_heads: int
    num_kv_heads: int
    mlp_dim: int
    positions: str
    dropout_rate: float
    init_std: float | None
    dtype: str
    remat: bool
    scan_layers: bool
    block_size: int
    attention_implementation: Implementation | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and what to keep.

    Attributes:
      every_steps: int, steps between two checkpoints.
      keep_last: int, newest checkpoints kept.
      keep_best: int, further checkpoints kept by lowest validation loss.
    """

    every_steps: int
    keep_last: int
    keep_best: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of a run; see `configs/base.py` for units and defaults.

    Attributes:
      recipe_name: str, which method trains.
      recipe_settings: dict of that method's keys.
      others: as in `configs/base.py`.
    """

    seed: int
    num_steps: int
    num_micro_batches: int
    eval_every_steps: int
    num_eval_batches: int
    log_every_steps: int
    max_consecutive_skips: int
    model: ModelSettings
    data: DataConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig
    recipe_name: str
    recipe_settings: Mapping[str, Any]


def parse_config(mapping: Mapping[str, Any]) -> TrainConfig:
    """Check a nested mapping and freeze it.

    Everything that can be known before the data is read is checked here.

    Args:
      mapping: nested dict (or ConfigDict) with exactly the keys of `configs/base.py`.

    Returns:
      TrainConfig.

    Raises:
      ConfigError: on an unknown or missing key, a wrong type or a value out of range; the
        message names key, value and expectation.
    """
    sections = {
        "model": ModelSettings,
        "optimizer": OptimizerConfig,
        "checkpoint": CheckpointConfig,
    }
    top = [
        field.name
        for field in dataclasses.fields(TrainConfig)
        if field.name not in ("data", *sections, "recipe_name", "recipe_settings")
    ]
    _check_keys(mapping, (*top, *sections, "data", "recipe"), "")
    try:
        values = {name: _cast(mapping[name], int, name) for name in top}
        built = {name: _build(cls, mapping[name], name) for name, cls in sections.items()}
        data = _build_data(mapping["data"], values["seed"])
        recipe = mapping["recipe"]
        _check_keys(recipe, ("name", *_RECIPES[1:]), "recipe.")
        _check(recipe["name"] in _RECIPES, "recipe.name", recipe["name"], f"one of {_RECIPES}")
        settings = dict(recipe[recipe["name"]]) if recipe["name"] != "dense" else {}
        config = TrainConfig(
            **values, **built, data=data, recipe_name=recipe["name"], recipe_settings=settings
        )
        _check_relations(config)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return config


def _check_relations(config: TrainConfig):
    for name in ("num_steps", "eval_every_steps", "log_every_steps", "num_micro_batches"):
        _check(getattr(config, name) >= 1, name, getattr(config, name), "at least 1")
    for name in ("num_eval_batches", "max_consecutive_skips", "seed"):
        _check(getattr(config, name) >= 0, name, getattr(config, name), "at least 0")
    for name, least in (("every_steps", 1), ("keep_last", 1), ("keep_best", 0)):
        value = getattr(config.checkpoint, name)
        _check(value >= least, f"checkpoint.{name}", value, f"at least {least}")
    _check(
        config.data.batch_size % config.num_micro_batches == 0,
        "num_micro_batches",
        config.num_micro_batches,
        f"a divisor of data.batch_size={config.data.batch_size}",
    )
    _check(config.model.vocab_size >= 0, "model.vocab_size", config.model.vocab_size, "at least 0")
    # A stand-in for what the data will say: everything else can be refused before reading it.
    # Of an encoder, because a causal pattern has fewer blocks to choose from.
    model = make_transformer_config(config, task="classification", vocab_size=1, num_classes=2)
    phases = make_recipe(config, model).phases
    for phase in phases[:-1]:
        _check(
            phase.last_step is None or phase.last_step < config.num_steps,
            "num_steps",
            config.num_steps,
            f"above {phase.last_step}, the step at which phase {phase.name!r} ends",
        )
    _check(
        config.model.attention_implementation is None or any(p.sparse_attention for p in phases),
        "model.attention_implementation",
        config.model.attention_implementation,
        f"None in recipe {config.recipe_name!r}, which has no sparse attention",
    )
    make_optimizer(config.optimizer, num_steps=config.num_steps)


def make_transformer_config(
    config: TrainConfig, *, task: str, vocab_size: int, num_classes: int
) -> TransformerConfig:
    """Complete the model's settings with what the data says.

    Args:
      config: TrainConfig.
      task: "language_model", "classification" or "matching".
      vocab_size: int, token ids in the data.
      num_classes: int, labels in the data, 0 for a language model.

    Returns:
      TransformerConfig.

    Raises:
      ConfigError: if the configured vocabulary is smaller than the data's, or settings
        contradict each other.
    """
    model = config.model
    _check(
        model.vocab_size == 0 or model.vocab_size >= vocab_size,
        "model.vocab_size",
        model.vocab_size,
        f"0 or at least the {vocab_size} token ids of data.source={config.data.source!r}",
    )
    size, length = model.block_size, config.data.sequence_length
    _check(
        size >= 1 and length % size == 0,
        "model.block_size",
        size,
        f"a positive divisor of data.sequence_length={length}",
    )
    shared = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(ModelSettings)
        if field.name
        not in ("vocab_size", "num_kv_heads", "block_size", "attention_implementation")
    }
    try:
        return TransformerConfig(
            **shared,
            vocab_size=model.vocab_size or vocab_size,
            num_kv_heads=model.num_kv_heads or model.num_heads,
            max_length=config.data.sequence_length,
            causal=task == "language_model",
            num_classes=num_classes,
            num_towers=2 if task == "matching" else 1,
            block=BlockPattern(block_q=model.block_size, block_kv=model.block_size),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def make_recipe(config: TrainConfig, model: TransformerConfig) -> Recipe:
    """Build the configured recipe for a model.

    Args:
      config: TrainConfig.
      model: TransformerConfig.

    Returns:
      Recipe.

    Raises:
      ConfigError: if a setting of the recipe is unknown, mistyped or out of range.
    """
    shape = {"causal": model.causal, "num_layers": model.num_layers}
    settings, prefix = config.recipe_settings, f"recipe.{config.recipe_name}"
    block_size = config.model.block_size
    try:
        if config.recipe_name == "spion":
            shape |= {"block_size": block_size, "length": model.max_length}
            return make_spion(_build(SpionConfig, settings, prefix, **shape))
        if config.recipe_name == "static_attention":
            shape["num_blocks"] = model.max_length // block_size
            return make_static_attention(_build(StaticAttentionConfig, settings, prefix, **shape))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return make_dense()


def find_differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the settings in which two nested mappings differ.

    Args:
      old: nested mapping.
      new: nested mapping.
      prefix: str, put before each key.

    Returns:
      list of str like "optimizer.learning_rate: 0.001 -> 0.002", sorted by key.

    Example:
      >>> find_differences({"a": {"b": 1}}, {"a": {"b": 2}})
      ['a.b: 1 -> 2']
    """
    lines = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += find_differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return lines


def _build_data(mapping: Mapping[str, Any], seed: int) -> DataConfig:
    mapping = dict(mapping)
    for key in ("source", "data_dir"):
        if isinstance(mapping.get(key), str):
            kind, colon, path = mapping[key].rpartition(":")
            mapping[key] = kind + colon + os.path.expanduser(path)
    try:
        return _build(DataConfig, mapping, "data", seed=seed)
    except ConfigError:
        raise
    except ValueError as error:
        # The data layer names its own fields.
        raise ConfigError(f"data.{error}") from error


def _build(cls, mapping: Mapping[str, Any], section: str, **known):
    hints = {name: hint for name, hint in typing.get_type_hints(cls).items() if name not in known}
    _check_keys(mapping, tuple(hints), f"{section}.")
    values = {name: _cast(mapping[name], hint, f"{section}.{name}") for name, hint in hints.items()}
    return cls(**values, **known)


def _check_keys(mapping: Mapping[str, Any], expected: tuple[str, ...], prefix: str):
    for key in mapping:
        if key not in expected:
            near = difflib.get_close_matches(key, expected, 1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known: {list(expected)}"
            raise ConfigError(f"unknown key {prefix}{key}{hint}")
    for key in expected:
        if key not in mapping:
            raise ConfigError(f"missing key {prefix}{key}")


def _cast(value: Any, hint: Any, name: str) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None:
            return None
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if isinstance(hint, typing.TypeAliasType):
        hint = hint.__value__
    if typing.get_origin(hint) is typing.Literal:
        _check(value in typing.get_args(hint), name, value, f"one of {typing.get_args(hint)}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{name} must be of type {hint.__name__}, got {value!r}")
    return value


def _check(ok: bool, name: str, value: Any, expected: str):
    if not ok:
        raise ConfigError(f"{name} must be {expected}, got {value!r}")
