"""All settings of a run as frozen values, and the model and recipe that they make with the data."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from sparsejax.checks import check_setting, make_check
from sparsejax.config.mesh import MeshConfig
from sparsejax.data import DataConfig
from sparsejax.models import (
    Implementation,
    TransformerConfig,
    TransformerOptions,
    find_model_class,
    list_backends,
    sparse_weight_patterns,
)
from sparsejax.optimizer import OptimizerConfig, make_optimizer
from sparsejax.patterns import BlockPattern, WeightPattern, parse_pattern_list
from sparsejax.recipes import Recipe, chain
from sparsejax.recipes.own import RecipeFacts, is_own, make_own_recipe
from sparsejax.recipes.registry import RECIPES


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings(TransformerOptions):
    """The part of a model that does not follow from the data.

    Attributes:
      vocab_size: token ids; 0 = as many as the data has. More is allowed, fewer refused.
      num_layers: transformer blocks.
      model_dim: width of the residual stream; a multiple of `num_heads`.
      num_heads: query heads.
      num_kv_heads: key/value heads, a divisor of `num_heads`; 0 = `num_heads`.
      mlp_dim: hidden width of the feed-forward layer.
      block_size: side of an attention block, positions; divides data.sequence_length.
      init_from: path of pretrained weights that training starts from, a folder of `transformers` or
        a GGUF file, whose settings those of the model have to be; "" = drawn. A run that is resumed
        does not read it again.
      attention_implementation: backend of sparse attention; None = the fastest proven here.
      weight_implementation: backend of sparse weights; None = the fastest proven here.
    """

    vocab_size: int = 0
    num_layers: int = 4
    model_dim: int = 128
    num_heads: int = 4
    num_kv_heads: int = 0
    mlp_dim: int = 512
    block_size: int = 64
    init_from: str = ""
    attention_implementation: Implementation | None = None
    weight_implementation: Implementation | None = None

    def __post_init__(self):
        check = make_check("model", self)
        check(self.vocab_size >= 0, "vocab_size", "at least 0")
        for name, op in (
            ("attention_implementation", "block_sparse_attention"),
            ("weight_implementation", "nm_matmul"),
        ):
            names = list_backends(op)
            check(getattr(self, name) in (None, *names), name, f"one of {names}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and what to keep.

    Attributes:
      every_steps: steps between two checkpoints.
      keep_last: newest checkpoints kept.
      keep_best: further checkpoints kept, by lowest validation loss.
    """

    every_steps: int = 100
    keep_last: int = 2
    keep_best: int = 1

    def __post_init__(self):
        check = make_check("checkpoint", self)
        for name, least in (("every_steps", 1), ("keep_last", 1), ("keep_best", 0)):
            check(getattr(self, name) >= least, name, f"at least {least}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeSettings:
    """Which method trains, or which two, and their settings.

    Attributes:
      name: one of `RECIPES`; "module:function", which makes a recipe of one's own; or two of these
        joined by "+", one that makes attention sparse and one that makes weights sparse.
      sections: settings of each method, by its name; of one's own under "own".
    """

    name: str = "dense"
    sections: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check = make_check("recipe", self)
        known = all(is_own(name) or name in RECIPES for name in self.methods)
        check(
            known,
            "name",
            f"one of {tuple(RECIPES)}, two of them joined by '+', or 'module:function'",
        )
        check(
            len(self.methods) <= 2 and len(set(self.methods)) == len(self.methods),
            "name",
            "one method, or two different ones joined by '+'",
        )
        claims = [name for name, section in self.sections.items() if section.get("sparse_weights")]
        check(
            len(claims) <= 1,
            "name",
            f"two methods of which one at most prunes weights; {' and '.join(claims)} do",
        )

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods, one or two."""
        return tuple(self.name.split("+"))

    @property
    def settings(self) -> Mapping[str, Any]:
        """Settings of a method that trains by itself."""
        return self.sections.get(self.name, {})


WATCHING = (
    "num_steps",
    "eval_every_steps",
    "num_eval_batches",
    "log_every_steps",
    "max_consecutive_skips",
    "checkpoint",
)
"""Settings that say how long a run goes on and how it is watched; all others define it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of a run.

    Attributes:
      seed: decides initial weights, order of the data and everything drawn.
      num_steps: optimizer steps of the whole run.
      schedule_steps: the steps that every share of the run is a share of, and over which the
        learning rate moves; 0 = num_steps. Fewer steps end the run before its schedule does; more
        go on at the schedule's last rate and leave phases and masks as they are. A run that is
        resumed keeps those it was started with.
      num_micro_batches: parts that a batch is split into to save memory.
      eval_every_steps: steps between two validations.
      num_eval_batches: batches of a validation; 0 = the whole validation split.
      log_every_steps: steps between two progress lines.
      max_consecutive_skips: steps in a row that may be skipped because they are not finite. The run
        fails if more are, or if all of its steps are.
      label_smoothing: share of a target that is spread over all classes, in training only.
      data: DataConfig; its seed is that of the run.
    """

    seed: int = 0
    num_steps: int = 1000
    schedule_steps: int = 0
    num_micro_batches: int = 1
    eval_every_steps: int = 100
    num_eval_batches: int = 8
    log_every_steps: int = 10
    max_consecutive_skips: int = 5
    label_smoothing: float = 0.0
    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    recipe: RecipeSettings = dataclasses.field(default_factory=RecipeSettings)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self):
        for name in ("num_steps", "eval_every_steps", "log_every_steps", "num_micro_batches"):
            check_setting(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("schedule_steps", "num_eval_batches", "max_consecutive_skips", "seed"):
            check_setting(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        check_setting(
            0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "in [0, 1)"
        )
        check_setting(
            self.data.batch_size % self.num_micro_batches == 0,
            "num_micro_batches",
            self.num_micro_batches,
            f"a divisor of data.batch_size={self.data.batch_size}",
        )
        make_optimizer(self.optimizer, num_steps=self.schedule_length)

    @property
    def schedule_length(self) -> int:
        """Steps of the schedule, whichever setting says them."""
        return self.schedule_steps or self.num_steps

    @property
    def step_options(self) -> dict[str, Any]:
        """Keyword arguments of `make_train_step` and `make_eval_step`."""
        return {
            "implementation": self.model.attention_implementation,
            "weight_implementation": self.model.weight_implementation,
            "num_micro_batches": self.num_micro_batches,
        }

    @property
    def named_implementations(self) -> str:
        """The backends that settings name, for a message; empty if they name none."""
        names = ("attention_implementation", "weight_implementation")
        values = {name: getattr(self.model, name) for name in names}
        return " and ".join(f"model.{n}={x!r}" for n, x in values.items() if x is not None)

    def to_dict(self) -> dict[str, Any]:
        """Return the nested mapping that `parse_config` reads.

        Of recipes, it holds the sections of those chosen only.
        """
        mapping = dataclasses.asdict(self)
        del mapping["data"]["seed"]
        sections = {name: dict(section) for name, section in self.recipe.sections.items()}
        mapping["recipe"] = {"name": self.recipe.name} | sections
        return mapping


def make_transformer_config(
    config: TrainConfig, *, task: str, vocab_size: int, num_classes: int, patch_values: int = 0
) -> TransformerConfig:
    """Complete the model's settings with what the data says.

    Args:
      config: the settings.
      task: of the data, see `sparsejax.batch`.
      vocab_size: token ids in the data, 0 of patches.
      num_classes: labels in the data, 0 for a language model and for translation.
      patch_values: bytes of a patch, 0 of token ids.

    Raises:
      ValueError: if the configured vocabulary is smaller than the data's, or settings contradict
        each other.
    """
    model, source = config.model, config.data.source
    check = make_check("model", model)
    find_model_class(model.own_class)
    check(
        model.vocab_size == 0 or model.vocab_size >= vocab_size,
        "vocab_size",
        f"0 or at least the {vocab_size} token ids of data.source={source!r}",
    )
    translates = task == "translation"
    check(
        (model.num_decoder_layers > 0) == translates,
        "num_decoder_layers",
        f"{'at least 1' if translates else '0'} for data.source={source!r}",
    )
    size, length = model.block_size, config.data.sequence_length
    check(
        size >= 1 and length % size == 0,
        "block_size",
        f"a positive divisor of data.sequence_length={length}",
    )
    shared = {
        field.name: getattr(model, field.name) for field in dataclasses.fields(TransformerOptions)
    }
    return TransformerConfig(
        **shared
        | {
            "vocab_size": model.vocab_size or vocab_size,
            "num_kv_heads": model.num_kv_heads or model.num_heads,
            "max_length": length,
            "causal": task == "language_model",
            "num_classes": num_classes,
            "patch_values": patch_values,
            "num_towers": 2 if task == "matching" else 1,
            "block": BlockPattern(block_q=size, block_kv=size),
            "sparse_weights": list_sparse_weights(config.recipe),
        }
    )


def make_recipe(config: TrainConfig, model: TransformerConfig) -> Recipe:
    """Build the configured recipe for a model, and check it against the rest of the settings.

    Args:
      config: the settings.
      model: what they are for.

    Raises:
      ValueError: if a setting is out of range or contradicts another.
    """
    block = model.block.block_q
    facts = RecipeFacts(
        num_layers=model.num_layers,
        length=model.max_length,
        block_size=block,
        num_blocks=model.max_length // block,
        causal=model.causal,
        num_heads=model.num_heads,
        head_dim=model.head_dim,
        num_steps=config.schedule_length,
        patterns=sparse_weight_patterns(model),
    )
    recipes = [_make_method(config.recipe, name, facts) for name in config.recipe.methods]
    if len(recipes) == 2:
        # Whichever of the two is named first.
        recipes.sort(key=lambda recipe: any(phase.sparse_weights for phase in recipe.phases))
        recipe = chain(*recipes)
    else:
        (recipe,) = recipes
    _check_phases(config, model, recipe)
    return recipe


def _make_method(settings: RecipeSettings, name: str, facts: RecipeFacts) -> Recipe:
    if is_own(name):
        return make_own_recipe(name, facts)
    entry, section = RECIPES[name], dict(settings.sections.get(name, {}))
    if entry.sparse_weights is not None:
        text = section.pop("sparse_weights", entry.sparse_weights)
        check_setting(
            bool(facts.patterns),
            f"recipe.{entry.name}.sparse_weights",
            text,
            "'regex=pattern' of at least one weight",
        )
    needs = {need: getattr(facts, need) for need in entry.needs}
    return entry.make(entry.config_class(**section, **needs))


def list_sparse_weights(settings: RecipeSettings) -> tuple[tuple[str, WeightPattern], ...]:
    """List the regular expressions of the weights that a method prunes, and their patterns.

    Args:
      settings: of the recipe, of whose sections at most one names weights.

    Raises:
      ValueError: if the section says something else.
    """
    for name, section in settings.sections.items():
        if text := section.get("sparse_weights"):
            return parse_pattern_list(text, f"recipe.{name}.sparse_weights")
    return ()


def _check_phases(config: TrainConfig, model: TransformerConfig, recipe: Recipe) -> None:
    phases, name = recipe.phases, config.recipe.name
    length, schedule = config.schedule_length, config.optimizer.schedule
    if config.num_steps > length and phases[-1].learning_rate == "schedule":
        optimizer = make_optimizer(config.optimizer, num_steps=length)
        check_setting(
            float(np.asarray(optimizer.schedule(length))) > 0,
            "num_steps",
            config.num_steps,
            f"at most schedule_steps={length}, at whose end the rate of {schedule!r} is 0",
        )
    check_setting(
        model.num_decoder_layers == 0 or not any(p.sparse_attention for p in phases),
        "recipe.name",
        name,
        "one without sparse attention for an encoder-decoder, whose attention is dense",
    )
    for phase in phases[:-1]:
        check_setting(
            phase.last_step is None or phase.last_step < config.schedule_length,
            "schedule_steps" if config.schedule_steps else "num_steps",
            config.schedule_length,
            f"above {phase.last_step}, the step at which phase {phase.name!r} ends",
        )
    check = make_check("model", config.model)
    check(
        config.model.attention_implementation is None or any(p.sparse_attention for p in phases),
        "attention_implementation",
        f"None in recipe {name!r}, which has no sparse attention",
    )
    check(
        config.model.weight_implementation is None or any(p.sparse_weights for p in phases),
        "weight_implementation",
        f"None in recipe {name!r}, which has no sparse weights",
    )
