"""Images in the IDX format of MNIST as sequences of pixels, row by row, or of patches."""

import itertools
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sparsejax.data.cache import identify_files
from sparsejax.data.config import DataConfig
from sparsejax.data.files import open_unpacked
from sparsejax.data.patches import PatchGrid, find_grid, identify_patches, read_patches
from sparsejax.data.source import Contents, Example, Options, Source, Split

OPTIONS = Options(
    {"train_split", "validation_split", "truncate", "patch_size"},
    with_patches=("image_size", "image_channels", "random_crop", "random_flip"),
)

_EXPECTED = "an IDX file"
_UNSIGNED_BYTE = 0x08
_BLOCK_BYTES = 1 << 20
# An item is one image, or one label.
_MOST_ITEMS, _MOST_VALUES = 2**31 - 1, 1 << 26


def describe_idx(config: DataConfig) -> Contents:
    """Describe the images: how many classes the labels have, and how large a patch is.

    Args:
      config: Settings with `source="idx:/folder"`.

    Returns:
      Their contents.

    Raises:
      ValueError: A file is missing, ambiguous or damaged, or the images do not fit the patches.
    """
    files = _find_files(config)
    return _describe(files, _find_grid(config, files))


def open_idx(config: DataConfig) -> Source:
    """Open a folder with `train-images*`, `train-labels*`, `t10k-images*` and `t10k-labels*`.

    Args:
      config: Settings with `source="idx:/folder"`; split names are the prefixes of the files.

    Returns:
      The set; grey levels are values in [0, 256), or images are cut into patches.

    Raises:
      ValueError: A file is missing, ambiguous, damaged, or does not fit the others or the
        patches.
    """
    files = _find_files(config)
    grid = _find_grid(config, files)

    def read(split: Split) -> Iterator[Example]:
        images, labels = files[split]
        count, expected = read_idx_shape(images, 3)[0], read_idx_shape(labels, 1)[0]
        if count != expected:
            raise ValueError(
                f"{images} has {count} images; expected {expected}, one for each label in {labels}"
            )
        for image, label in zip(_read_items(images, 3), _read_items(labels, 1), strict=True):
            if grid is None:
                yield Example((image.reshape(-1),), int(label))
            else:
                document = read_patches(image[..., None], grid, config.image_size)
                yield Example((document,), int(label))

    found = itertools.chain(*files.values())
    return Source(
        contents=_describe(files, grid),
        identity={
            "idx": identify_files((file.name, file) for file in found),
            **identify_patches(config),
        },
        read=read,
        grid=grid,
    )


def read_idx(path: Path, num_axes: int) -> Iterator[np.ndarray]:
    """Read one IDX file of unsigned bytes, compressed with gzip or plain, block by block.

    No more is read or unpacked than its header announces.

    Args:
      path: The file.
      num_axes: Number of axes it must have.

    Yields:
      uint8[n, ...], consecutive items along the first axis, about a megabyte.

    Raises:
      ValueError: The file cannot be read, is damaged, or is not such a file.
    """
    with open_unpacked(path, _EXPECTED) as file:
        count, *item_shape = shape = _parse_shape(path, file, num_axes)
        size = math.prod(shape)
        item_size = math.prod(item_shape)
        block = max(1, _BLOCK_BYTES // item_size)
        for start in range(0, count, block):
            num_items = min(block, count - start)
            contents = file.read(num_items * item_size)
            if len(contents) < num_items * item_size:
                raise ValueError(
                    f"{path} holds {start * item_size + len(contents)} values; expected {size} "
                    f"for shape {shape}"
                )
            yield np.frombuffer(contents, np.uint8).reshape(num_items, *item_shape)
        if file.read(1):
            raise ValueError(f"{path} holds more than {size} values; expected so many for {shape}")


def read_idx_shape(path: Path, num_axes: int) -> tuple[int, ...]:
    """Read the shape that the header of an IDX file announces.

    Args:
      path: The file.
      num_axes: Number of axes it must have.

    Returns:
      Sizes of the axes, each at least 1.

    Raises:
      ValueError: The file cannot be read, or has no such header.
    """
    with open_unpacked(path, _EXPECTED) as file:
        return _parse_shape(path, file, num_axes)


def _parse_shape(path: Path, file: BinaryIO, num_axes: int) -> tuple[int, ...]:
    magic, header_bytes = bytes((0, 0, _UNSIGNED_BYTE, num_axes)), 4 * (1 + num_axes)
    header = file.read(header_bytes)
    if header[:4] == magic and len(header) < header_bytes:
        raise ValueError(
            f"{path} ends after {len(header)} bytes; expected an IDX header of {header_bytes}"
        )
    if header[:4] != magic:
        raise ValueError(
            f"{path} begins with {header[:4].hex()!r}; expected the IDX header "
            f"{magic.hex()!r} (unsigned bytes, {num_axes} axes)"
        )
    shape = struct.unpack(f">{num_axes}I", header[4:])
    if 0 in shape or shape[0] > _MOST_ITEMS or math.prod(shape[1:]) > _MOST_VALUES:
        raise ValueError(
            f"{path} announces the shape {shape}; expected 1 to {_MOST_ITEMS:,} items of 1 to "
            f"{_MOST_VALUES:,} values each"
        )
    return shape


def _read_items(path: Path, num_axes: int) -> Iterator[np.ndarray]:
    return itertools.chain.from_iterable(read_idx(path, num_axes))


def _describe(files: dict[Split, tuple[Path, Path]], grid: PatchGrid | None) -> Contents:
    highest = max(int(block.max()) for _, labels in files.values() for block in read_idx(labels, 1))
    return Contents(
        "classification",
        num_values=256,
        num_classes=1 + highest,
        patch_values=grid.patch_values if grid else 0,
    )


def _find_grid(config: DataConfig, files: dict[Split, tuple[Path, Path]]) -> PatchGrid | None:
    """Return how the training images fall into patches, None without patches."""
    if not config.patch_size:
        return None
    _, height, width = read_idx_shape(files["train"][0], 3)
    return find_grid(config, (height, width, 1))


def _find_files(config: DataConfig) -> dict[Split, tuple[Path, Path]]:
    """Return the files of images and of labels by split."""
    folder = Path(config.rest)
    names: dict[Split, str] = {
        "train": config.train_split or "train",
        "validation": config.validation_split or "t10k",
    }
    return {
        split: (_find_file(folder, f"{name}-images"), _find_file(folder, f"{name}-labels"))
        for split, name in names.items()
    }


def _find_file(folder: Path, prefix: str) -> Path:
    source = f"idx:{folder}"
    if not folder.is_dir():
        raise ValueError(f"source={source!r}: no such folder")
    found = sorted(file for file in folder.iterdir() if file.name.startswith(prefix))
    if len(found) != 1:
        raise ValueError(
            f"source={source!r}: found {[file.name for file in found]}; expected one file whose "
            f"name begins with {prefix!r}"
        )
    if not found[0].is_file():
        raise ValueError(f"source={source!r}: {found[0].name} must be a file")
    return found[0]
