"""From the mapping a user edits to frozen, checked settings; the only reader of that mapping."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from sparsejax.models import Implementation, TransformerConfig, list_backends
from sparsejax.patterns import BlockPattern
from sparsejax.recipes import Recipe
from sparsejax.training.data import DataConfig
from sparsejax.training.optimizer import OptimizerConfig, make_optimizer
from sparsejax.training.recipe_settings import RECIPES, build_recipe, parse_sparse_weights
from sparsejax.training.settings import (
    ConfigError,
    build_settings,
    cast_value,
    check_keys,
    check_setting,
)


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
    num_decoder_layers: int
    mlp_activation: str
    positions: str
    dropout_rate: float
    init_std: float | None
    dtype: str
    remat: bool
    scan_layers: bool
    use_bias: bool
    embedding_norm: bool
    block_size: int
    attention_implementation: Implementation | None
    weight_implementation: Implementation | None


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
    label_smoothing: float
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
    top = {
        field.name: field.type
        for field in dataclasses.fields(TrainConfig)
        if field.name not in ("data", *sections, "recipe_name", "recipe_settings")
    }
    check_keys(mapping, (*top, *sections, "data", "recipe"), "")
    try:
        values = {name: cast_value(mapping[name], hint, name) for name, hint in top.items()}
        built = {name: build_settings(cls, mapping[name], name) for name, cls in sections.items()}
        data = _build_data(mapping["data"], values["seed"])
        recipe = mapping["recipe"]
        check_keys(recipe, ("name", *RECIPES[1:]), "recipe.")
        check_setting(recipe["name"] in RECIPES, "recipe.name", recipe["name"], f"one of {RECIPES}")
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
        check_setting(getattr(config, name) >= 1, name, getattr(config, name), "at least 1")
    for name in ("num_eval_batches", "max_consecutive_skips", "seed"):
        check_setting(getattr(config, name) >= 0, name, getattr(config, name), "at least 0")
    check_setting(
        0 <= config.label_smoothing < 1, "label_smoothing", config.label_smoothing, "in [0, 1)"
    )
    for name, least in (("every_steps", 1), ("keep_last", 1), ("keep_best", 0)):
        value = getattr(config.checkpoint, name)
        check_setting(value >= least, f"checkpoint.{name}", value, f"at least {least}")
    check_setting(
        config.data.batch_size % config.num_micro_batches == 0,
        "num_micro_batches",
        config.num_micro_batches,
        f"a divisor of data.batch_size={config.data.batch_size}",
    )
    check_setting(
        config.model.vocab_size >= 0, "model.vocab_size", config.model.vocab_size, "at least 0"
    )
    model = _make_stand_in(config)
    phases = make_recipe(config, model).phases
    check_setting(
        model.num_decoder_layers == 0 or not any(p.sparse_attention for p in phases),
        "recipe.name",
        config.recipe_name,
        "one without sparse attention for an encoder-decoder, whose attention is dense",
    )
    for phase in phases[:-1]:
        check_setting(
            phase.last_step is None or phase.last_step < config.num_steps,
            "num_steps",
            config.num_steps,
            f"above {phase.last_step}, the step at which phase {phase.name!r} ends",
        )
    for name, op in (
        ("attention_implementation", "block_sparse_attention"),
        ("weight_implementation", "nm_matmul"),
    ):
        value, names = getattr(config.model, name), list_backends(op)
        check_setting(value in (None, *names), f"model.{name}", value, f"one of {names}")
    check_setting(
        config.model.attention_implementation is None or any(p.sparse_attention for p in phases),
        "model.attention_implementation",
        config.model.attention_implementation,
        f"None in recipe {config.recipe_name!r}, which has no sparse attention",
    )
    check_setting(
        config.model.weight_implementation is None or any(p.sparse_weights for p in phases),
        "model.weight_implementation",
        config.model.weight_implementation,
        f"None in recipe {config.recipe_name!r}, which has no sparse weights",
    )
    make_optimizer(config.optimizer, num_steps=config.num_steps)


def _make_stand_in(config: TrainConfig) -> TransformerConfig:
    """Return a model of data that is not read yet: what no data could make valid is refused now.

    It is an encoder, because a causal pattern has fewer blocks to choose from.
    """
    patches = bool(config.data.patch_size)
    tasks = {"classification": 2, "masked_language_model": 0}
    if config.data.kind == "pairs":
        tasks = {"translation": 0}
    refused = None
    for task, num_classes in tasks.items():
        try:
            return make_transformer_config(
                config,
                task=task,
                vocab_size=int(not patches),
                num_classes=num_classes,
                patch_values=int(patches),
            )
        except ConfigError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def make_transformer_config(
    config: TrainConfig, *, task: str, vocab_size: int, num_classes: int, patch_values: int = 0
) -> TransformerConfig:
    """Complete the model's settings with what the data says.

    Args:
      config: TrainConfig.
      task: "language_model", "masked_language_model", "classification", "matching" or
        "translation".
      vocab_size: int, token ids in the data, 0 of patches.
      num_classes: int, labels in the data, 0 for a language model and for translation.
      patch_values: int, bytes of a patch, 0 of token ids.

    Returns:
      TransformerConfig.

    Raises:
      ConfigError: if the configured vocabulary is smaller than the data's, or settings
        contradict each other.
    """
    model = config.model
    check_setting(
        model.vocab_size == 0 or model.vocab_size >= vocab_size,
        "model.vocab_size",
        model.vocab_size,
        f"0 or at least the {vocab_size} token ids of data.source={config.data.source!r}",
    )
    translates = task == "translation"
    check_setting(
        (model.num_decoder_layers > 0) == translates,
        "model.num_decoder_layers",
        model.num_decoder_layers,
        f"{'at least 1' if translates else '0'} for data.source={config.data.source!r}",
    )
    size, length = model.block_size, config.data.sequence_length
    check_setting(
        size >= 1 and length % size == 0,
        "model.block_size",
        size,
        f"a positive divisor of data.sequence_length={length}",
    )
    shared = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(ModelSettings)
        if field.name
        not in (
            "vocab_size",
            "num_kv_heads",
            "block_size",
            "attention_implementation",
            "weight_implementation",
        )
    }
    sparse_weights = parse_sparse_weights(config.recipe_name, config.recipe_settings)
    try:
        return TransformerConfig(
            **shared,
            vocab_size=model.vocab_size or vocab_size,
            num_kv_heads=model.num_kv_heads or model.num_heads,
            max_length=config.data.sequence_length,
            causal=task == "language_model",
            num_classes=num_classes,
            patch_values=patch_values,
            num_towers=2 if task == "matching" else 1,
            block=BlockPattern(block_q=model.block_size, block_kv=model.block_size),
            sparse_weights=sparse_weights,
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
    return build_recipe(
        config.recipe_name, config.recipe_settings, model, num_steps=config.num_steps
    )


def step_options(config: TrainConfig) -> dict[str, Any]:
    """Return what the functions that make steps need to know of the settings.

    Args:
      config: TrainConfig.

    Returns:
      dict of keyword arguments of `make_train_step` and its siblings.
    """
    return {
        "implementation": config.model.attention_implementation,
        "weight_implementation": config.model.weight_implementation,
        "num_micro_batches": config.num_micro_batches,
    }


def name_kernels(config: TrainConfig) -> str:
    """Write the kernels that the settings name, for a message.

    Args:
      config: TrainConfig.

    Returns:
      str such as "model.attention_implementation='xla'"; empty if none is named.
    """
    names = ("attention_implementation", "weight_implementation")
    values = {name: getattr(config.model, name) for name in names}
    return " and ".join(f"model.{n}={x!r}" for n, x in values.items() if x is not None)


def _build_data(mapping: Mapping[str, Any], seed: int) -> DataConfig:
    mapping = dict(mapping)
    for key in ("source", "data_dir"):
        if isinstance(mapping.get(key), str):
            kind, colon, path = mapping[key].rpartition(":")
            mapping[key] = kind + colon + os.path.expanduser(path)
    try:
        return build_settings(DataConfig, mapping, "data", seed=seed)
    except ConfigError:
        raise
    except ValueError as error:
        # The data layer names its own fields.
        raise ConfigError(f"data.{error}") from error
