"""How recipes find the masks of weights in a stacked model, and the weights that belong to them.

Legend: L layers, K contracted axis, N columns of a weight.
"""

from collections.abc import Callable

import jax

from sparsejax.types import PyTree

_MASK, _WEIGHT = "kernel_mask", "kernel"


def map_weight_masks(
    function: Callable[[str, jax.Array, jax.Array], jax.Array], masks: PyTree, params: PyTree
) -> PyTree:
    """Replace every mask of a weight by a function of name, mask and weight.

    Args:
      function: (name, mask bool[L, K, N], weight float[L, K, N]) -> array; the name is that of
        the layer inside a block, such as "mlp/up".
      masks: nested dict of the model's masks.
      params: nested dict of the model's parameters.

    Returns:
      Nested dict like `masks`; masks of other things, such as attention, stay.
    """

    def replace(path, mask):
        keys = [entry.key for entry in path]
        if keys[-1] != _MASK:
            return mask
        return function("/".join(keys[1:-1]), mask, _look_up(params, (*keys[:-1], _WEIGHT)))

    return jax.tree_util.tree_map_with_path(replace, masks)


def get_weight_masks(masks: PyTree) -> dict[str, jax.Array]:
    """Return the masks of weights by the name of their layer.

    Args:
      masks: nested dict of the model's masks.

    Returns:
      dict of bool[L, K, N], such as {"mlp/up": ...}; empty if no weight is sparse.
    """
    return {
        "/".join(entry.key for entry in path[1:-1]): mask
        for path, mask in jax.tree_util.tree_leaves_with_path(masks)
        if path[-1].key == _MASK
    }


def map_sparse_weights(
    function: Callable[..., jax.Array],
    params: PyTree,
    masks: PyTree,
    other: PyTree | None = None,
) -> PyTree:
    """Replace every weight that has a mask by a function of name, mask and weight.

    Args:
      function: (name, mask bool[L, K, N], weight float[L, K, N]) -> array like the weight.
      params: nested dict of the model's parameters.
      masks: nested dict of the model's masks.
      other: nested dict like `params` whose leaves are replaced instead, or None for `params`:
        the function then gets (name, mask, weight, leaf).

    Returns:
      Nested dict like `params`; other leaves stay.
    """
    by_name = get_weight_masks(masks)

    def replace(path, leaf, *weight):
        keys = [entry.key for entry in path]
        name = "/".join(keys[1:-1])
        if keys[-1] != _WEIGHT or name not in by_name:
            return leaf
        return function(name, by_name[name], *weight, leaf)

    if other is None:
        return jax.tree_util.tree_map_with_path(replace, params)
    return jax.tree_util.tree_map_with_path(replace, other, params)


def _look_up(tree: PyTree, keys: tuple[str, ...]) -> jax.Array:
    for key in keys:
        tree = tree[key]
    return tree
