"""Read settings and parameters of a checkpoint of another library."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparsejax.models import TransformerConfig
from sparsejax.pretrained.checkpoint import Checkpoint
from sparsejax.pretrained.families import find_family
from sparsejax.pretrained.family import Family
from sparsejax.pretrained.folder import open_folder
from sparsejax.pretrained.gguf_file import open_gguf
from sparsejax.pretrained.leaves import Shape, check_tensors, list_tensors, read_leaf
from sparsejax.pretrained.settings import Settings


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Open a folder as `transformers` saves it, or a GGUF file.

    Raises:
      ValueError: if it is neither.
    """
    path = Path(path)
    if path.is_dir():
        return open_folder(path)
    if path.suffix == ".gguf" and path.is_file():
        return open_gguf(path)
    raise ValueError(
        f"pretrained weights must be a folder with config.json or a .gguf file, got {str(path)!r}, "
        + ("which is neither" if path.exists() else "which does not exist")
    )


def read_settings(checkpoint: Checkpoint) -> tuple[Family, dict[str, Any]]:
    """Return the family of a checkpoint, and its settings of TransformerConfig.

    Returns:
      Family, and settings by name; `max_length` is the context of training.

    Raises:
      ValueError: if the family is unknown, or a setting has no counterpart.
    """
    family = find_family(checkpoint.settings, checkpoint.origin)
    fixed = {name: values[0] for name, values in family.fixed.items()}
    return family, fixed | family.read_config(Settings(checkpoint.settings, checkpoint.origin))


def read_leaves(
    checkpoint: Checkpoint,
    family: Family,
    config: TransformerConfig,
    shapes: Mapping[str, Shape],
    trained: int,
) -> Iterator[tuple[str, np.ndarray]]:
    """Read the parameters of a model, one at a time.

    Args:
      shapes: of the parameters, by their paths.
      trained: int, positions that the model was trained with.

    Returns:
      Iterator of paths and f32 arrays.

    Raises:
      ValueError: if a tensor is missing, too many, or of another shape, before any is read.
    """
    leaves = family.list_leaves(config, trained)
    expected: dict[str, Shape] = {}
    for leaf in leaves:
        expected |= list_tensors(leaf, shapes[leaf.path])
    theirs = {family.complete(name, expected): name for name in checkpoint.shapes}
    found = {
        name: checkpoint.shapes[key]
        for name, key in theirs.items()
        if not re.fullmatch(family.ignored, name)
    }

    def read(name: str) -> np.ndarray:
        return checkpoint.read(theirs[name])

    copies = family.copies if config.tied_head else {}
    again = {name: found.pop(name) for name in copies if name in found}
    check_tensors(expected, found, origin=checkpoint.origin)
    for name, shape in again.items():
        original = copies[name]
        if shape != expected[original] or not np.array_equal(read(name), read(original)):
            raise ValueError(
                f"{checkpoint.origin}: the tensor {name!r} must equal {original!r}, for the two "
                "are tied"
            )
    return ((leaf.path, read_leaf(leaf, shapes[leaf.path], read)) for leaf in leaves)
