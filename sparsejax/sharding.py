"""Where arrays lie on a mesh of devices: the leaves of a state, and activations while tracing.

  data      parts of the batch, each with a whole copy of the state
  fsdp      parts of the batch that share one copy: parameters, masks and moments are cut
  context   parts of the positions; inside attention, parts of the heads (Ulysses)
  tensor    parts of the heads and of the feed-forward columns

Nothing here has an effect without a mesh of several devices in force, so that a model is one
program text for one device and for many. Programs on a mesh are lowered inside `use_mesh`.

References:
  ZeRO stage 3: Rajbhandari et al., arXiv:1910.02054. Tensor parallelism: Shoeybi et al.,
  arXiv:1909.08053. Ulysses: Jacobs et al., arXiv:2309.14509.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsejax.types import PyTree

AXES = ("data", "fsdp", "context", "tensor")
"""Axes of a mesh; devices that are next to each other differ in the last one."""
BATCH = ("data", "fsdp")
"""The axes that examples are dealt out over."""
HEADS = ("tensor", "context")
"""The axes that heads are dealt out over inside attention."""

_GROUP = 4
"""Parts of a weight hold whole groups of so many rows and columns: 2:4 masks need it."""

type AxisNames = str | tuple[str, ...] | None

# The first pattern that the end of a leaf's path matches gives the axes of its last dimensions. So
# a weight, its mask and its moments are cut alike, wherever they are in the state. Columns of qkv
# and key_value change places before they are cut over "tensor": see `deal_columns`.
RULES: tuple[tuple[str, tuple[AxisNames, ...]], ...] = (
    (r"(qkv|key_value)(/(kernel|kernel_mask|gradient_mask))?", (("fsdp", "tensor"), None)),
    (r"(query|up)(/(kernel|kernel_mask|gradient_mask))?", ("fsdp", "tensor")),
    (r"(out|down)(/(kernel|kernel_mask|gradient_mask))?", ("tensor", "fsdp")),
    (r"embedding(/(embedding|embedding_mask|gradient_mask))?", ("tensor", "fsdp")),
    (r"(hidden|patches)/kernel", (None, "fsdp")),
    (r"classifier/kernel", ("fsdp", None)),
    (r"head/kernel", ("fsdp", "tensor")),
    (r"head_transform/dense/kernel", (None, "fsdp")),
    (r"position", (None, "fsdp")),
    # Statistics of SPION and SAT: attention maps of all layers.
    (r"map_before", (BATCH, None)),
)
_LARGE_BYTES = 1 << 20


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Arrange devices.

    Args:
      sizes: of each of `AXES`.
      devices: as many as the product of the sizes; None = all of all processes.

    Returns:
      Mesh whose axes are Auto: XLA places what is not said.
    """
    shape = tuple(sizes[name] for name in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def make_abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """Make a mesh of no devices, to trace programs for as many as its sizes say.

    Args:
      sizes: of each of `AXES`.
    """
    shape = tuple(sizes[name] for name in AXES)
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def use_mesh(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    """Put a mesh in force while a program is traced and lowered.

    Args:
      mesh: one of a single device has no effect.
    """
    return jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext()


def find_spec(path: str, shape: Sequence[int], sizes: Mapping[str, int]) -> P:
    """Return where a leaf of a state lies.

    Args:
      path: names joined by "/".
      shape: of the leaf.
      sizes: of the axes of the mesh.

    Returns:
      PartitionSpec. A dimension that an axis does not divide into whole groups of four is not cut
      by it.

    Example:
      >>> sizes = {"data": 1, "fsdp": 8, "context": 1, "tensor": 1}
      >>> tuple(find_spec("params/blocks/mlp/up/kernel", (12, 768, 3072), sizes))
      (None, 'fsdp', None)
      >>> tuple(find_spec("params/blocks/mlp/up/kernel", (12, 36, 144), sizes))
      (None, None, None)
    """
    last = _find_rule(path, len(shape))
    if last is None:
        return P()
    names = (None,) * (len(shape) - len(last)) + last
    return P(*(_fit(n, size, sizes) for n, size in zip(names, shape, strict=True)))


def _find_rule(path: str, num_axes: int) -> tuple[AxisNames, ...] | None:
    for pattern, last in RULES:
        if len(last) <= num_axes and re.search(rf"(^|/){pattern}$", path):
            return last
    return None


def _fit(names: AxisNames, size: int, sizes: Mapping[str, int]) -> AxisNames:
    kept: list[str] = []
    for name in (names,) if isinstance(names, str) else names or ():
        parts = math.prod(sizes[each] for each in (*kept, name))
        if sizes[name] > 1 and size % (parts * _GROUP) == 0:
            kept.append(name)
    return tuple(kept) if len(kept) > 1 else kept[0] if kept else None


def shard_tree(tree: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
    """Return where every leaf of a state lies, by its path.

    Args:
      tree: of arrays or jax.ShapeDtypeStruct.
      mesh: with `AXES`.

    Returns:
      tree of NamedSharding.
    """
    sizes = dict(mesh.shape)

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, find_spec(name, leaf.shape, sizes))

    return jax.tree_util.tree_map_with_path(place, tree)


def list_whole_leaves(tree: PyTree, mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """List the large leaves of a state that are not cut as they could be.

    Those that no rule knows, if "fsdp" cuts others; and those that an axis of their rule does not
    divide into whole groups of four.

    Args:
      tree: of arrays or jax.ShapeDtypeStruct.
      mesh: with `AXES`.

    Returns:
      "path over axis" -> bytes, of leaves above 1 MiB, largest first.
    """
    sizes, whole = dict(mesh.shape), {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        size = leaf.size * leaf.dtype.itemsize
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        wanted = _flatten(_find_rule(path, len(leaf.shape)) or ("fsdp",)) - {"data"}
        cut = _flatten(find_spec(path, leaf.shape, sizes))
        for axis in sorted(wanted - cut):
            if sizes[axis] > 1 and size > _LARGE_BYTES:
                whole[f"{path} over {axis}"] = size
    return dict(sorted(whole.items(), key=lambda item: -item[1]))


def _flatten(names: Iterable[AxisNames]) -> set[str]:
    return {x for n in names for x in ((n,) if isinstance(n, str) else n or ())}


def get_sizes() -> Mapping[str, int]:
    """Return the sizes of `AXES` in force: 1 each where a program is for one device."""
    mesh = _get_mesh()
    return dict.fromkeys(AXES, 1) if mesh is None else dict(mesh.shape)


def is_mapped() -> bool:
    """Return whether arrays are cut: a mesh of several devices with `AXES` is in force."""
    return _get_mesh() is not None


def _get_mesh() -> AbstractMesh | None:
    mesh = jax.sharding.get_abstract_mesh()
    cut = mesh.axis_names == AXES and mesh.size > 1 and not mesh.manual_axes
    return mesh if cut else None


def constrain(x: jax.Array, *names: AxisNames) -> jax.Array:
    """Say how an array lies on the mesh in force; without one, nothing.

    Args:
      x: array.
      *names: axes of the mesh, for each dimension.

    Returns:
      the same values.
    """
    return jax.lax.with_sharding_constraint(x, P(*names)) if is_mapped() else x


def cut_positions(x_BTD: jax.Array) -> jax.Array:
    """Say that activations are cut over examples and positions; without a mesh, nothing.

    Args:
      x_BTD: float[B, T, D].

    Returns:
      the same values.
    """
    return constrain(x_BTD, BATCH, "context", None)


def map_parts(
    function: Callable[..., Any], in_specs: Sequence[Any], out_specs: Any
) -> Callable[..., Any]:
    """Run a function on each device's part of its arrays; without a mesh in force, just run it.

    For kernels, which XLA cannot divide, and for what XLA would divide badly. Nothing is exchanged
    but what the function says. Gradients of what devices share are summed over them.

    Args:
      function: of arrays, and of None where there is none.
      in_specs: as of `jax.shard_map`, one for each argument: axes that are not named stay whole.
      out_specs: of what it returns.
    """
    if not is_mapped():
        return function

    def run(*arrays):
        specs = tuple(None if x is None else s for x, s in zip(arrays, in_specs, strict=True))
        return jax.shard_map(function, in_specs=specs, out_specs=out_specs)(*arrays)

    return run


def gather_weight(x: jax.Array, axis: int) -> jax.Array:
    """Gather a weight that "fsdp" cuts, inside `map_parts`.

    Its gradient is summed in parts: first "fsdp" deals them out, then each is added up over the
    other devices that have examples or positions of their own. The other way round whole gradients
    would be added up.

    Args:
      x: a device's part.
      axis: that is cut.

    Returns:
      the whole along that axis.
    """
    x = jax.lax.pcast(x, ("data", "context"), to="varying")
    return jax.lax.all_gather(x, "fsdp", axis=axis, tiled=True)


def fit_axis(name: str, size: int) -> str | None:
    """Return an axis of the mesh in force if it cuts a length into whole groups of four, else None.

    Args:
      name: of the axis.
      size: the length.
    """
    fitted = _fit(name, size, get_sizes())
    assert not isinstance(fitted, tuple)
    return fitted


def map_tiles(
    function: Callable[..., jax.Array], path: str, shape: Sequence[int]
) -> Callable[..., jax.Array]:
    """Run a search that looks at groups or tiles of four alone on each device's part of a weight.

    Args:
      function: (array of the weight's shape) -> array of that shape.
      path: of the weight in the state, as for `find_spec`.
      shape: of the weight.

    Returns:
      the function of the whole weight.
    """
    if not is_mapped():
        return function
    spec = find_spec(path, shape, get_sizes())
    return map_parts(function, (spec,), spec)


def deal_columns(x: jax.Array, segments: Sequence[int], parts: int) -> jax.Array:
    """Reorder columns so that each part has its share of every segment.

    Of [q | k | v], two parts hold [q0 k0 v0 | q1 k1 v1]: what belongs to a part's heads lies there.

    Args:
      x: [..., N].
      segments: lengths whose sum is N; multiples of `parts`.
      parts: how many parts the columns are cut into.

    Returns:
      like x.

    Example:
      >>> deal_columns(np.arange(8), (4, 2, 2), 2).tolist()
      [0, 1, 4, 6, 2, 3, 5, 7]
    """
    if parts == 1 or len(segments) < 2:
        return x
    lead = x.shape[:-1]
    ends = np.cumsum(segments)[:-1].tolist()
    pieces = [s.reshape(*lead, parts, -1) for s in jax.numpy.split(x, ends, axis=-1)]
    return jax.numpy.concatenate(pieces, axis=-1).reshape(x.shape)


def split_dealt(x: jax.Array, segments: Sequence[int], parts: int) -> Iterator[jax.Array]:
    """Split dealt columns into their segments, each in its own order again.

    Args:
      x: [..., N], as `deal_columns` orders it.
      segments: lengths whose sum is N.
      parts: how many parts the columns are cut into.

    Yields:
      [..., length] of each segment.
    """
    lead = x.shape[:-1]
    ends = (np.cumsum(segments)[:-1] // parts).tolist()
    for piece in jax.numpy.split(x.reshape(*lead, parts, -1), ends, axis=-1):
        yield piece.reshape(*lead, -1)
