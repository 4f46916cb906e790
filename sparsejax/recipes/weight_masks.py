"""Find the masks of weights in a stacked model, and the weights they belong to.

A weight that is not stacked, the token embedding, counts as a stack of one. The mask of a weight in
blocks has one entry per block: read bool[L, I, J] where this says bool[L, K, N].

Legend: L layers, K contracted axis, N columns of a weight, I x J blocks.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.masks import expand_mask, flip_rate, total_flip_rate
from sparsejax.recipes.phases import Measured, keep_where
from sparsejax.types import PyTree

_WEIGHTS = {"kernel_mask": "kernel", "embedding_mask": "embedding"}
_GRADIENT_MASK = "gradient_mask"
_STACK = "blocks"

FLIP_PROGRESS = (("flip_rate", "flip rate"),)
"""What progress lines show of `flip_metrics`, as `Recipe.progress_metrics`."""


def map_weight_masks(
    function: Callable[[str, jax.Array, jax.Array], jax.Array], masks: PyTree, params: PyTree
) -> PyTree:
    """Replace every mask of a weight by a function of name, mask and weight.

    Args:
      function: (name, mask bool[L, K, N], weight float[L, K, N]) -> array; the name is that of
        the layer inside a block, such as "mlp/up", or "decoder/mlp/up" in a decoder's.
      masks: nested dict of the model's masks.
      params: nested dict of the model's parameters.

    Returns:
      Nested dict like `masks`; masks of other things, such as attention, stay.
    """

    def replace(path, mask):
        if path[-1].key not in _WEIGHTS:
            return mask
        weight = _find_layer(params, path)[_WEIGHTS[path[-1].key]]
        return _map_stacked(path, function, mask, weight)

    return jax.tree_util.tree_map_with_path(replace, masks)


def set_gradient_masks(masks: PyTree, everywhere: jax.typing.ArrayLike) -> PyTree:
    """Set which blocks get a weight gradient: those kept, or all.

    Args:
      masks: nested dict of the model's masks.
      everywhere: bool[], True = all; a traced value does not recompile.

    Returns:
      Nested dict like `masks` with new `gradient_mask` leaves, if it has any.
    """

    def replace(path, mask):
        if path[-1].key != _GRADIENT_MASK:
            return mask
        layer = _find_layer(masks, path)
        (kept,) = (layer[name] for name in _WEIGHTS if name in layer)
        return kept | everywhere

    return jax.tree_util.tree_map_with_path(replace, masks)


def get_weight_masks(masks: PyTree) -> dict[str, jax.Array]:
    """Return the masks of weights by the name of their layer.

    Args:
      masks: nested dict of the model's masks.

    Returns:
      dict of bool[L, K, N], such as {"mlp/up": ...}; empty if no weight is sparse.
    """
    return {
        _layer_name(path): mask if _is_stacked(path) else mask[None]
        for path, mask in jax.tree_util.tree_leaves_with_path(masks)
        if path[-1].key in _WEIGHTS
    }


def apply_weight_masks(masks: PyTree, tree: PyTree) -> PyTree:
    """Set to 0 what masks prune.

    Args:
      masks: nested dict of the model's masks.
      tree: nested dict like the model's parameters: they, or their gradients.

    Returns:
      Nested dict like `tree`; weights without a mask stay.
    """
    return map_sparse_weights(
        lambda name, mask, x: jnp.where(expand_mask(mask, x.shape), x, 0), masks, tree
    )


def compute_weight_density(masks: PyTree) -> dict[str, jax.Array]:
    """Return the fraction of entries that each mask of a weight keeps, per layer.

    Args:
      masks: nested dict of the model's masks.

    Returns:
      dict, name -> f32[L].

    Numerics:
      Counts are exact. The product with 1 / size is the same jitted or not.
    """
    return {
        name: mask.sum((1, 2), dtype=jnp.int32).astype(jnp.float32) * np.float32(1 / mask[0].size)
        for name, mask in get_weight_masks(masks).items()
    }


def map_sparse_weights(
    function: Callable[..., jax.Array], masks: PyTree, tree: PyTree, *rest: PyTree
) -> PyTree:
    """Replace every leaf that belongs to a weight with a mask.

    Args:
      function: (name, mask bool[L, K, N], leaf of `tree`, leaves of `rest`) -> array like the leaf.
      masks: nested dict of the model's masks.
      tree: nested dict like the model's parameters: those, or their gradients.
      *rest: nested dicts like `tree`.

    Returns:
      Nested dict like `tree`; other leaves stay.
    """
    by_name = get_weight_masks(masks)

    def replace(path, *leaves):
        name = _layer_name(path)
        if path[-1].key not in _WEIGHTS.values() or name not in by_name:
            return leaves[0]
        return _map_stacked(path, lambda name, *x: function(name, by_name[name], *x), *leaves)

    return jax.tree_util.tree_map_with_path(replace, tree, *rest)


def map_moments(function: Callable[..., jax.Array], masks: PyTree, opt_state: PyTree) -> PyTree:
    """Replace the moments of every weight with a mask, wherever an optimizer keeps them.

    Args:
      function: (name, mask bool[L, K, N], moment of the weight, *, order) -> array like the moment.
        The order is 2 for means of squared gradients, which Optax calls "nu", and 1 for others.
      masks: nested dict of the model's masks.
      opt_state: pytree in which moments are dicts with the key "model", whose value is like the
        model's parameters.

    Returns:
      Pytree like `opt_state`; other leaves stay.
    """

    def is_moments(node):
        return isinstance(node, dict) and "model" in node

    def replace(path, node):
        if not is_moments(node):
            return node
        order = 2 if jax.tree_util.keystr(path[-1:], simple=True) == "nu" else 1
        change = functools.partial(function, order=order)
        return node | {"model": map_sparse_weights(change, masks, node["model"])}

    return jax.tree_util.tree_map_with_path(replace, opt_state, is_leaf=is_moments)


def compare_weight_masks(
    old: dict[str, jax.Array], new: dict[str, jax.Array]
) -> dict[str, dict[str, jax.Array] | jax.Array]:
    """Measure how much masks have changed, as statistics of a recipe.

    Args:
      old: name -> bool[L, K, N].
      new: the same later.

    Returns:
      dict with "flip_rates", name -> f32[L], and "flip_rate", f32[], over all weights.
    """
    return {
        "flip_rates": {name: flip_rate(old[name], new[name]) for name in new},
        "flip_rate": total_flip_rate(old, new),
    }


def flip_metrics(statistics: dict[str, Any], *, due: jax.Array) -> dict[str, Measured]:
    """Return the flip rates of `compare_weight_masks` as metrics.

    Args:
      statistics: dict with "flip_rates" and "flip_rate".
      due: bool[], whether masks have just been compared.

    Returns:
      dict with "flip_rate", f32[], and "flip_rate/NAME", f32[L]; known if masks were compared.
    """
    rates = {f"flip_rate/{name}": rate for name, rate in statistics["flip_rates"].items()}
    rates["flip_rate"] = statistics["flip_rate"]
    return {name: keep_where(due, rate) for name, rate in rates.items()}


def draw_flip_rates(name: str, rows: Sequence[Mapping[str, Any]], *, folder: Path) -> None:
    """Draw the flip rates of a run, as `Recipe.draw_run`.

    Args:
      name: of the recipe, for the title.
      rows: lines of `metrics.jsonl`.
      folder: where `flip_rates.png` is written; nothing is, if no row has a flip rate.
    """
    if any("flip_rate" in row for row in rows):
        from sparsejax.report.plots.flips import plot_flip_rates

        title = f"{name}: how fast the masks of weights change"
        plot_flip_rates(rows, path=folder / "flip_rates.png", title=title)


def _layer_name(path: tuple[Any, ...]) -> str:
    # Where the stack lies tells layers of equal names apart: decoder/blocks/mlp/up.
    return "/".join(entry.key for entry in path[:-1] if entry.key != _STACK)


def _find_layer(tree: PyTree, path: tuple[Any, ...]) -> dict[str, Any]:
    for entry in path[:-1]:
        tree = tree[entry.key]
    return tree


def _is_stacked(path: tuple[Any, ...]) -> bool:
    return any(entry.key == _STACK for entry in path)


def _map_stacked(path: tuple[Any, ...], function: Callable[..., jax.Array], *leaves: jax.Array):
    if _is_stacked(path):
        return function(_layer_name(path), *leaves)
    return function(_layer_name(path), *(x[None] for x in leaves))[0]
