"""The methods by name: one row per method, all that settings know of it."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from sparsejax.recipes.attention.dynamic_attention import (
    DynamicAttentionConfig,
    make_dynamic_attention,
)
from sparsejax.recipes.attention.sat import SatConfig, make_sat
from sparsejax.recipes.attention.spion import SpionConfig, make_spion
from sparsejax.recipes.attention.static_attention import (
    StaticAttentionConfig,
    make_static_attention,
)
from sparsejax.recipes.dense import DenseConfig, make_dense
from sparsejax.recipes.dynamic.magnitude import MagnitudeConfig, make_magnitude
from sparsejax.recipes.dynamic.mst import MSTConfig, make_mst
from sparsejax.recipes.dynamic.rigl import RigLConfig, make_rigl
from sparsejax.recipes.dynamic.set import SETConfig, make_set
from sparsejax.recipes.dynamic.static_weights import StaticWeightsConfig, make_static_weights
from sparsejax.recipes.nm.fst import FSTConfig, make_fst
from sparsejax.recipes.nm.sste import SSTEConfig, make_sste
from sparsejax.recipes.recipe import Recipe


class RecipeEntry(NamedTuple):
    """One method.

    Attributes:
      name: of the method and of its section of settings.
      config_class: dataclass of its settings. Fields named in `needs` come from the model and the
        run, all others from the section, with the defaults of the class.
      make: config -> Recipe.
      needs: what the method needs to know of the model and of the run: any of "num_layers",
        "length", "block_size" and "num_blocks" (of attention), "causal", "num_heads", "head_dim",
        "num_steps", and "patterns", layer name -> pattern of its weight.
      sparse_weights: default of the setting that names the weights to prune, as "regex=pattern;
        regex=pattern"; None if the method prunes none.
    """

    name: str
    config_class: type
    make: Callable[[Any], Recipe]
    needs: tuple[str, ...] = ()
    sparse_weights: str | None = None

    @property
    def setting_names(self) -> tuple[str, ...]:
        """Names of the fields of `config_class` that a user sets."""
        names = (field.name for field in dataclasses.fields(self.config_class))
        return tuple(name for name in names if name not in self.needs)


_ATTENTION = ("num_layers", "length", "block_size", "causal", "num_steps")
_WEIGHTS = ("num_steps", "patterns")
_ALL_WEIGHTS = ".*=unstructured"

RECIPES: dict[str, RecipeEntry] = {
    entry.name: entry
    for entry in (
        RecipeEntry("dense", DenseConfig, make_dense),
        RecipeEntry("spion", SpionConfig, make_spion, (*_ATTENTION, "num_heads")),
        RecipeEntry("sat", SatConfig, make_sat, (*_ATTENTION, "num_heads", "head_dim")),
        RecipeEntry(
            "static_attention",
            StaticAttentionConfig,
            make_static_attention,
            ("num_layers", "num_blocks", "causal", "num_steps"),
        ),
        RecipeEntry(
            "dynamic_attention",
            DynamicAttentionConfig,
            make_dynamic_attention,
            (*_ATTENTION, "num_heads", "head_dim"),
        ),
        RecipeEntry("fst", FSTConfig, make_fst, _WEIGHTS, "mlp/.*=2:4 transposable"),
        RecipeEntry("sste", SSTEConfig, make_sste, ("patterns",), "mlp/.*=2:4"),
        RecipeEntry(
            "mst",
            MSTConfig,
            make_mst,
            (*_WEIGHTS, "length", "block_size", "causal"),
            _ALL_WEIGHTS,
        ),
        RecipeEntry("rigl", RigLConfig, make_rigl, _WEIGHTS, _ALL_WEIGHTS),
        RecipeEntry("set", SETConfig, make_set, _WEIGHTS, _ALL_WEIGHTS),
        RecipeEntry("magnitude", MagnitudeConfig, make_magnitude, _WEIGHTS, _ALL_WEIGHTS),
        RecipeEntry(
            "static_weights", StaticWeightsConfig, make_static_weights, _WEIGHTS, _ALL_WEIGHTS
        ),
    )
}
"""By name."""
