"""Which tensors of another library make a parameter of a Transformer, in both directions.

Legend: L layers, K inputs, N outputs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sparsejax.types import PyTree

type Shape = tuple[int, ...]


class Leaf(NamedTuple):
    """A parameter of a Transformer and the tensors that hold it elsewhere.

    Attributes:
      path: of the parameter, such as "blocks.mlp.up.kernel"; those of blocks have an axis L.
      names: of the tensors, which lie side by side along the last axis; "{}" stands for the layer.
      widths: columns of each; () of a tensor alone.
      transposed: whether the tensors are [N, K].
      rows: rows of the tensor, of which the parameter has the first; 0 = as many.
      offset: tensor whose first row is added to every row; "" = none.
      offset_rows: rows of that tensor.
    """

    path: str
    names: tuple[str, ...]
    widths: tuple[int, ...] = ()
    transposed: bool = False
    rows: int = 0
    offset: str = ""
    offset_rows: int = 0


def list_linear(
    path: str,
    names: Sequence[str],
    *,
    widths: Sequence[int] = (),
    transposed: bool = True,
    use_bias: bool = True,
) -> list[Leaf]:
    """List the leaves of a linear layer.

    Args:
      path: of the layer.
      names: of the layers elsewhere.
      widths: columns of each.
      transposed: whether their weights are [N, K].
      use_bias: whether there are biases.
    """
    weights, biases = (tuple(f"{name}.{kind}" for name in names) for kind in ("weight", "bias"))
    leaves = [Leaf(f"{path}.kernel", weights, tuple(widths), transposed)]
    if use_bias:
        leaves.append(Leaf(f"{path}.bias", biases, tuple(widths)))
    return leaves


def list_norm(path: str, name: str, *, use_bias: bool = True) -> list[Leaf]:
    """List the leaves of a norm.

    Args:
      path: of the norm.
      name: of the norm elsewhere.
      use_bias: whether it has a bias.
    """
    leaves = [Leaf(f"{path}.scale", (f"{name}.weight",))]
    return [*leaves, Leaf(f"{path}.bias", (f"{name}.bias",))] if use_bias else leaves


def list_tensors(leaf: Leaf, shape: Shape) -> dict[str, Shape]:
    """Return the tensors of a leaf and their shapes.

    Args:
      shape: of the parameter.

    Example:
      >>> leaf = Leaf("blocks.mlp.up.kernel", ("{}.up", "{}.gate"), (3, 3), transposed=True)
      >>> list_tensors(leaf, (2, 8, 6))
      {'0.up': (3, 8), '0.gate': (3, 8), '1.up': (3, 8), '1.gate': (3, 8)}
    """
    found = {}
    for _, layer_shape, names in _list_layers(leaf, shape):
        rest = (leaf.rows or layer_shape[0], *layer_shape[1:])[:-1]
        for name, width in zip(names, leaf.widths or layer_shape[-1:], strict=True):
            tensor = (*rest, width)
            found[name] = tensor[::-1] if leaf.transposed else tensor
    if leaf.offset:
        found[leaf.offset] = (leaf.offset_rows, shape[-1])
    return found


def read_leaf(leaf: Leaf, shape: Shape, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """Put a parameter together.

    Args:
      shape: of the parameter.
      read: reads the tensor of a name, shaped as `list_tensors` says.

    Returns:
      f32 of the shape.
    """
    value = np.empty(shape, np.float32)
    for index, layer_shape, names in _list_layers(leaf, shape):
        start = 0
        for name, width in zip(names, leaf.widths or layer_shape[-1:], strict=True):
            tensor = read(name)
            tensor = tensor.T if leaf.transposed else tensor[: layer_shape[0]]
            value[index][..., start : start + width] = tensor
            start += width
    if leaf.offset:
        value += read(leaf.offset)[0].astype(np.float32)
    return value


def write_leaf(leaf: Leaf, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Take a parameter apart: the inverse of `read_leaf`, with an offset of zeros.

    Args:
      value: float array, the parameter.

    Yields:
      name and tensor.
    """
    for index, layer_shape, names in _list_layers(leaf, value.shape):
        start = 0
        for name, width in zip(names, leaf.widths or layer_shape[-1:], strict=True):
            tensor = value[index][..., start : start + width]
            yield name, np.ascontiguousarray(tensor.T if leaf.transposed else tensor)
            start += width
    if leaf.offset:
        yield leaf.offset, np.zeros((leaf.offset_rows, value.shape[-1]), value.dtype)


def check_tensors(
    expected: Mapping[str, Shape], found: Mapping[str, Shape], *, origin: str
) -> None:
    """Refuse a checkpoint whose tensors are not those of its config.

    Args:
      expected: names and shapes.
      found: those of the checkpoint, without those that say nothing new.
      origin: str, what the message calls the checkpoint.

    Raises:
      ValueError: if a tensor is missing, too many or of another shape.
    """
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"{origin} must hold the tensor {name!r} {list(shape)}, found none")
        if found[name] != shape:
            raise ValueError(
                f"{origin}: the tensor {name!r} must be {list(shape)} as the config says, "
                f"got {list(found[name])}"
            )
    extra = [name for name in found if name not in expected]
    if extra:
        raise ValueError(
            f"{origin} must hold no tensor that its architecture does not have, found {extra[0]!r} "
            f"{list(found[extra[0]])}" + (f" and {len(extra) - 1} more" if extra[1:] else "")
        )


def flatten(tree: PyTree, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts by their paths, such as "blocks.mlp.up.kernel"."""
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    leaves = {}
    for name, value in tree.items():
        leaves |= flatten(value, f"{prefix}{name}.")
    return leaves


def nest(leaves: Mapping[str, Any]) -> PyTree:
    """Return the nested dicts that `flatten` made flat."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def _list_layers(leaf: Leaf, shape: Shape) -> Iterator[tuple[Any, Shape, list[str]]]:
    """Yield the index of each layer, or of everything, its shape and names."""
    if "{}" not in leaf.names[0]:
        yield ..., shape, list(leaf.names)
        return
    for layer in range(shape[0]):
        yield layer, shape[1:], [name.format(layer) for name in leaf.names]
