"""Recipes from outside of this package, by the name of the function that makes them."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

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
      head_dim: width of a head.
      num_steps: steps of the run.
      patterns: layer name -> pattern of its weight, of those that are sparse.
    """

    num_layers: int
    length: int
    block_size: int
    num_blocks: int
    causal: bool
    head_dim: int
    num_steps: int
    patterns: Mapping[str, WeightPattern]


type RecipeFactory = Callable[[RecipeFacts], Recipe]


def is_own(name: str) -> bool:
    """Whether a name is that of a function, "module:function", and of no method of ours."""
    return ":" in name


def name_factory(factory: RecipeFactory) -> str:
    """Return the name that `find_factory` finds a function by.

    Args:
      factory: a function at the top of a module.

    Raises:
      ValueError: if it is none, so that a run could not say what trained it.

    Example:
      >>> name_factory(find_factory)
      'sparsejax.recipes.own:find_factory'
    """
    module, name = getattr(factory, "__module__", None), getattr(factory, "__qualname__", "")
    if not callable(factory) or not module or not name.isidentifier():
        raise ValueError(
            "recipe must be a function at the top of a module, so that a run can name it, "
            f"got {factory!r}"
        )
    return f"{module}:{name}"


def find_factory(name: str) -> RecipeFactory:
    """Import the function that makes a recipe.

    Args:
      name: "package.module:function".

    Raises:
      ValueError: if there is no such module or function; the message says which.

    Example:
      >>> find_factory("sparsejax.recipes.own:is_own").__name__
      'is_own'
    """
    module_name, _, function_name = name.partition(":")
    expected = "the module and name of a function, as in 'my_package.my_module:make_recipe'"
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"recipe.name must be {expected}, got {name!r}: {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"recipe.name must be {expected}, got {name!r}") from error
    factory: Any = getattr(module, function_name, None)
    if not callable(factory):
        raise ValueError(
            f"recipe.name must be {expected}, got {name!r}: {module_name} has no function "
            f"{function_name!r}"
        )
    return factory


def make_own_recipe(name: str, factory: RecipeFactory, facts: RecipeFacts) -> Recipe:
    """Make a recipe, and check that it is one.

    Args:
      name: of the factory, for messages.
      factory: what makes it.
      facts: what it is called with.

    Raises:
      ValueError: if it does not return a Recipe, or its phases are not what a run needs.
    """
    recipe = factory(facts)
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
