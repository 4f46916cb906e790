"""Ops on several devices: inside `jax.shard_map`, and on meshes with explicit shardings.

Inside `jax.shard_map` the type of an array says over which axes of the mesh it varies. All arrays
of a call are made to vary alike: then constants that a loop starts from can be made to as well, and
the gradient of an array that all devices share is summed over them.

On an explicit mesh the type of an array says how it is sharded. Where no device needs what another
holds, each runs the op on its part, inside `jax.shard_map`. Otherwise XLA partitions the op.
"""

import functools
import math
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec


def vary_alike[Tree](tree: Tree) -> Tree:
    """Make all arrays vary over the mesh axes of `jax.shard_map` that any of them varies over.

    Args:
      tree: pytree of arrays.

    Returns:
      the same values; outside `jax.shard_map` the very same arrays.
    """
    return vary_like(tree, tree)


def vary_like[Tree](tree: Tree, like: Any) -> Tree:
    """Make arrays vary over the mesh axes of `jax.shard_map` that others vary over.

    Args:
      tree: pytree of arrays, such as the constants that a loop starts from.
      like: pytree of arrays, such as those that its body reads.

    Returns:
      the same values; outside `jax.shard_map` the very same arrays.
    """
    axes = frozenset().union(*(_find_varying(x) for x in jax.tree.leaves(like)))

    def vary(x):
        missing = tuple(sorted(axes - _find_varying(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree) if axes else tree


def _find_varying(x) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def name_axes(count: int) -> str:
    """Return letters for axes that have no name of their own.

    Args:
      count: of axes.

    Example:
      >>> name_axes(3)
      'abc'
    """
    return string.ascii_lowercase[:count]


def run_on_mesh(
    function: Callable[..., Any],
    arrays: Sequence[Any],
    axes: Sequence[str],
    results: Sequence[str],
    *,
    parts: Mapping[str, int],
    mean: bool = False,
) -> Any:
    """Call an op on arrays that may be sharded over a mesh with explicit axes.

    Axes of arrays go by letters. Where only those are sharded that the op works on part by part,
    each device calls the function on its part; an array that is not sharded there is cut without
    communication. Otherwise the function is traced once, for XLA to partition.

    Args:
      function: (*arrays, whole) -> tuple of arrays, or of pytrees of them. `whole` is True where
        XLA partitions it: no kernel can run then.
      arrays: pytrees of arrays; None where there is none.
      axes: for each, letters of the leading axes of its arrays; axes without one belong to no part.
      results: the same for what the function returns.
      parts: letter -> what the length of a part is a multiple of, for the axes that the op can work
        on part by part.
      mean: whether results are averaged over parts.

    Returns:
      what the function returns; sharded as the arrays are along axes with letters.
    """
    mesh = _find_mesh(arrays)
    if mesh is None:
        return function(*vary_alike(tuple(arrays)), whole=False)
    found = _find_cuts(arrays, axes)
    if not _can_cut(found, arrays, axes, parts, mesh):
        return _run_whole(function, arrays, results, found, mesh)
    cuts = {letter: names for letter, (names,) in found.items()}

    def run_part(*arrays):
        out = function(*vary_alike(arrays), whole=False)
        over = tuple(name for names in cuts.values() for name in names)
        return jax.lax.pmean(out, over) if mean and over else out

    def spread(letters, x):
        # An axis of length 1 is what all parts share.
        lengths = zip(letters, x.shape, strict=False)
        return PartitionSpec(*(cuts.get(a) if length > 1 else None for a, length in lengths))

    specs = [
        jax.tree.map(functools.partial(spread, letters), x)
        for letters, x in zip(axes, arrays, strict=True)
    ]
    placed = jax.tree.map(functools.partial(_place, mesh), list(arrays), specs)
    return jax.shard_map(
        run_part,
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=tuple(PartitionSpec(*(cuts.get(a) for a in letters)) for letters in results),
        # The empty set stands for all of a mesh, but for axes that vmap has taken away.
        axis_names=set() if mesh.are_all_axes_explicit else set(mesh.explicit_axes),
    )(*placed)


def _place(mesh, x, spec) -> jax.Array:
    if _list_spec(x) == _list_names(spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, spec))


def _find_mesh(arrays: Sequence[Any]) -> AbstractMesh | None:
    """Return the mesh with explicit axes that arrays are on, if sharding can matter there."""
    leaves = jax.tree.leaves(tuple(arrays))
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in leaves)]
    mesh = next((mesh for mesh in meshes if mesh.explicit_axes), None)
    if mesh is None or (mesh.size == 1 and not any(map(_list_spec, leaves))):
        return None
    return mesh


def _list_spec(x: jax.Array) -> dict[int, tuple[str, ...]]:
    """Position -> mesh axes, of the axes of an array that are sharded."""
    return _list_names(jax.typeof(x).sharding.spec)


def _list_names(spec: PartitionSpec) -> dict[int, tuple[str, ...]]:
    return {at: (n,) if isinstance(n, str) else tuple(n) for at, n in enumerate(spec) if n}


def _find_cuts(
    arrays: Sequence[Any], axes: Sequence[str]
) -> dict[str | None, list[tuple[str, ...]]]:
    """Letter, or None for axes without one -> mesh axes that arrays are sharded over there."""
    found: dict[str | None, list[tuple[str, ...]]] = {}
    for letters, tree in zip(axes, arrays, strict=True):
        for x in jax.tree.leaves(tree):
            for at, names in _list_spec(x).items():
                known = found.setdefault(letters[at] if at < len(letters) else None, [])
                if names not in known:
                    known.append(names)
    return found


def _can_cut(found, arrays, axes, parts, mesh) -> bool:
    """Return whether every device can work on its part."""
    if any(letter not in parts or len(names) > 1 for letter, names in found.items()):
        return False
    over = [name for (names,) in found.values() for name in names]
    counts = {a: math.prod(mesh.shape[name] for name in names) for a, (names,) in found.items()}
    return len(set(over)) == len(over) and all(
        length == 1 or length % (counts[letter] * parts[letter]) == 0
        for letters, tree in zip(axes, arrays, strict=True)
        for x in jax.tree.leaves(tree)
        for letter, length in zip(letters, x.shape, strict=False)
        if letter in counts
    )


def _run_whole(function, arrays, results, found, mesh) -> Any:
    """Let XLA partition the function; results are sharded as the arrays are, where they can be."""
    shardings = []
    for letters in results:
        spec, used = [], set()
        for letter in letters:
            names = next((n for n in found.get(letter, []) if not used & set(n)), None)
            used |= set(names or ())
            spec.append(names)
        shardings.append(NamedSharding(mesh, PartitionSpec(*spec)))
    run = jax.sharding.auto_axes(
        functools.partial(function, whole=True),
        axes=mesh.explicit_axes,
        out_sharding=tuple(shardings),
    )
    return run(*arrays)
