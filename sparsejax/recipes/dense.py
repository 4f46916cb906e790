"""No sparsity: the control run of every comparison."""

from sparsejax.recipes.recipe import Phase, Recipe


def make_dense() -> Recipe:
    """Return the recipe that prunes nothing.

    Returns:
      Recipe with the single phase "dense".

    Example:
      >>> make_dense().phases[0].sparse_attention
      False
    """
    return Recipe(name="dense", phases=(Phase("dense"),))
