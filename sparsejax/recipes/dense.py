"""No sparsity: the control run of every comparison."""

import dataclasses

from sparsejax.recipes.recipe import Phase, Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """Dense training has no settings."""


def make_dense(config: DenseConfig | None = None) -> Recipe:
    """Return the recipe that prunes nothing, which has the single phase "dense".

    Args:
      config: without effect; every recipe takes one.

    Example:
      >>> make_dense().phases[0].sparse_attention
      False
    """
    del config
    return Recipe(name="dense", phases=(Phase("dense"),))
