"""Recipes from outside of this package, by the name of the function that makes them."""

import dataclasses
from collections.abc import Mapping

from sparsejax.dotted import find_function
from sparsejax.patterns import WeightPattern
from sparsejax.recipes.recipe import Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeFacts:
    """What a recipe may need to know of the model and of the run.

    Attributes:
      num_layers: layers of the model.
      length: positions T.
      block_size: side of an attention block, positions.
      num_blocks: blocks along one side, T / block_size.
      causal: attention sees what lies before.
      num_heads: query heads.
      head_dim: width of a head.
      num_steps: steps of the run.
      patterns: layer name -> pattern of its weight, of those that are sparse.
    """

    num_layers: int
    length: int
    block_size: int
    num_blocks: int
    causal: bool
    num_heads: int
    head_dim: int
    num_steps: int
    patterns: Mapping[str, WeightPattern]


def is_own(name: str) -> bool:
    """Whether a name is that of a function, "module:function", and of no method of ours."""
    return ":" in name


def make_own_recipe(name: str, facts: RecipeFacts) -> Recipe:
    """Make a recipe, and check that it is one.

    Args:
      name: "package.module:function"; the function takes RecipeFacts and returns a Recipe.
      facts: what it is called with.

    Raises:
      ValueError: if there is no such function, it fails with a TypeError, it does not return a
        Recipe, or the phases of the recipe are not what a run needs.
    """
    try:
        recipe = find_function(name, "recipe.name")(facts)
    except TypeError as error:
        # Which a Recipe that lacks a field raises, too.
        raise ValueError(
            f"recipe.name={name!r} must return a sparsejax.recipes.Recipe, but fails with "
            f"TypeError: {error}"
        ) from error
    if not isinstance(recipe, Recipe):
        raise ValueError(
            f"recipe.name={name!r} must return a sparsejax.recipes.Recipe, got {type(recipe)}"
        )
    names = [phase.name for phase in recipe.phases]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"recipe.name={name!r} must return a recipe with phases of different names, got {names}"
        )
    hooks = {field: getattr(recipe, field) for field in Recipe._fields[2:]}
    for field, hook in hooks.items():
        if field not in ("progress_metrics", "parts") and not callable(hook):
            raise ValueError(
                f"recipe.name={name!r} must return a recipe whose {field} is a function, "
                f"got {hook!r}"
            )
    return recipe
