"""From the section of a recipe in the settings to the recipe."""

import re
from collections.abc import Mapping
from typing import Any

from sparsejax.config.parse import ConfigError, build_settings, cast_value, check_setting
from sparsejax.models import TransformerConfig, sparse_weight_patterns
from sparsejax.patterns import WeightPattern, parse_weight_pattern
from sparsejax.recipes import (
    FSTConfig,
    MagnitudeConfig,
    MSTConfig,
    Recipe,
    RigLConfig,
    SatConfig,
    SETConfig,
    SpionConfig,
    SSTEConfig,
    StaticAttentionConfig,
    StaticConfig,
    make_dense,
    make_fst,
    make_magnitude,
    make_mst,
    make_rigl,
    make_sat,
    make_set,
    make_spion,
    make_sste,
    make_static,
    make_static_attention,
)

_MAKERS = {
    "spion": (SpionConfig, make_spion),
    "sat": (SatConfig, make_sat),
    "static_attention": (StaticAttentionConfig, make_static_attention),
    "fst": (FSTConfig, make_fst),
    "sste": (SSTEConfig, make_sste),
    "mst": (MSTConfig, make_mst),
    "rigl": (RigLConfig, make_rigl),
    "set": (SETConfig, make_set),
    "magnitude": (MagnitudeConfig, make_magnitude),
    "static": (StaticConfig, make_static),
}
_PRUNE_WEIGHTS = ("fst", "sste", "mst", "rigl", "set", "magnitude", "static")

RECIPES = ("dense", *_MAKERS)
"""Names of the recipes; each but the first has a section of that name."""


def build_recipe(
    name: str, settings: Mapping[str, Any], model: TransformerConfig, *, num_steps: int
) -> Recipe:
    """Build a recipe for a model.

    Args:
      name: str, one of `RECIPES`.
      settings: the recipe's section.
      model: TransformerConfig.
      num_steps: int, steps of the run.

    Returns:
      Recipe.

    Raises:
      ConfigError: if a setting is unknown, mistyped or out of range.
    """
    if name == "dense":
        return make_dense()
    prefix, (config_class, make) = f"recipe.{name}", _MAKERS[name]
    known = _describe_model(name, model, num_steps)
    if name in _PRUNE_WEIGHTS:
        check_setting(
            bool(known["patterns"]),
            f"{prefix}.sparse_weights",
            settings.get("sparse_weights"),
            "'regex=pattern' of at least one weight",
        )
        # Those of the model, and of the search for a decay rate.
        others = ("sparse_weights", "decay_candidates")
        settings = {key: value for key, value in settings.items() if key not in others}
    try:
        return make(build_settings(config_class, settings, prefix, **known))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def parse_sparse_weights(
    recipe_name: str, settings: Mapping[str, Any]
) -> tuple[tuple[str, WeightPattern], ...]:
    """Read "regex=pattern; regex=pattern" of a recipe that prunes weights.

    Args:
      recipe_name: str.
      settings: the recipe's section.

    Returns:
      tuple of pairs, in order; empty if the recipe prunes no weights.

    Raises:
      ConfigError: if the text is anything else.
    """
    text = settings.get("sparse_weights", "")
    name = f"recipe.{recipe_name}.sparse_weights"
    pairs = []
    for entry in filter(None, (part.strip() for part in cast_value(text, str, name).split(";"))):
        regex, equals, pattern = entry.rpartition("=")
        check_setting(equals == "=" and bool(regex), name, text, "'regex=pattern; regex=pattern'")
        try:
            re.compile(regex)
            pairs.append((regex.strip(), parse_weight_pattern(pattern)))
        except (ValueError, re.error) as error:
            raise ConfigError(f"{name}: {entry!r}: {error}") from error
    return tuple(pairs)


def _describe_model(name: str, model: TransformerConfig, num_steps: int) -> dict[str, Any]:
    """Return the fields of a recipe's settings that the run knows."""
    block_size = model.block.block_q
    attention = {"block_size": block_size, "length": model.max_length, "causal": model.causal}
    layers = {"num_layers": model.num_layers}
    if name == "spion":
        return attention | layers
    if name == "sat":
        return attention | layers | {"head_dim": model.head_dim}
    if name == "static_attention":
        return layers | {
            "causal": model.causal,
            "num_blocks": model.max_length // block_size,
        }
    weights: dict[str, Any] = {"patterns": sparse_weight_patterns(model)}
    if name == "sste":
        return weights
    weights["num_steps"] = num_steps
    return weights | attention if name == "mst" else weights
