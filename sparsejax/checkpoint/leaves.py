"""The leaves of a state by their paths, and whether two states have the same ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from sparsejax.types import PyTree


def name_leaves(tree: PyTree) -> dict[str, Any]:
    """Name each leaf by its path, such as "params/block/w".

    Args:
      tree: PyTree whose None are leaves.

    Raises:
      ValueError: if two leaves have the same path.
    """
    paths_and_leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_none)
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in paths_and_leaves
    }
    if len(named) < len(paths_and_leaves):
        raise ValueError("state must give each leaf its own path; some key contains a '/'")
    return named


def is_none(leaf: Any) -> bool:
    """Tell `jax.tree` functions that None is a leaf."""
    return leaf is None


def describe_leaves(leaves: Mapping[str, Any]) -> dict[str, str]:
    """Describe each leaf by its dtype and shape.

    Args:
      leaves: arrays, jax.ShapeDtypeStruct or None by name.

    Returns:
      dict of str by name, such as "float32[2, 3]" or "None".
    """
    return {
        name: "None" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"
        for name, leaf in leaves.items()
    }


def check_storable(name: str, leaf: Any) -> jax.Array | None:
    """Return a leaf that can be stored exactly.

    Args:
      name: of the leaf.
      leaf: anything.

    Returns:
      The leaf.

    Raises:
      ValueError: if it is neither None nor a jax.Array with elements.
    """
    if leaf is None or (isinstance(leaf, jax.Array) and leaf.size):
        return leaf
    raise ValueError(f"state leaf {name} must be a jax.Array with elements, or None, got {leaf!r}")


def compare_leaves(path: Path, on_disk: Mapping[str, str], asked: Mapping[str, str]) -> None:
    """Compare what a checkpoint holds with what is asked of it.

    Args:
      path: of the checkpoint.
      on_disk: what `describe_leaves` said of it.
      asked: what `describe_leaves` says now.

    Raises:
      ValueError: if they differ; the message names the first five leaves.
    """
    differences = [
        f"{name}: {on_disk.get(name, 'nothing')} on disk, {asked.get(name, 'nothing')} asked for"
        for name in {**on_disk, **asked}
        if on_disk.get(name) != asked.get(name)
    ]
    if differences:
        more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise ValueError(
            f"abstract_state must match the checkpoint {path}, but "
            + "; ".join(differences[:5])
            + more
        )
