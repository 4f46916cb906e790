"""Images in the IDX format of MNIST as sequences of pixels, row by row, or of patches."""

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sparsejax.data.cache import hash_json
from sparsejax.data.config import DataConfig
from sparsejax.data.patches import PatchGrid, find_grid, identify_patches, read_patches
from sparsejax.data.source import Contents, Example, Options, Source, Split

OPTIONS = Options(
    {"train_split", "validation_split", "truncate", "patch_size"},
    with_patches=("image_size", "image_channels", "random_crop", "random_flip"),
)

_UNSIGNED_BYTE = 0x08


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
    return _describe(_read_labels(files), _find_grid(config, files))


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
    labels, grid = _read_labels(files), _find_grid(config, files)

    def read(split: Split) -> Iterator[Example]:
        images = read_idx(files[split][0], 3)
        if len(images) != len(labels[split]):
            raise ValueError(
                f"{files[split][0]} has {len(images)} images; expected "
                f"{len(labels[split])}, one for each label in {files[split][1]}"
            )
        for image, label in zip(images, labels[split], strict=True):
            if grid is None:
                yield Example((image.reshape(-1),), int(label))
            else:
                document = read_patches(image[..., None], grid, config.image_size)
                yield Example((document,), int(label))

    stats = [(file.name, file.stat()) for pair in files.values() for file in pair]
    return Source(
        contents=_describe(labels, grid),
        identity={
            "idx": hash_json([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]),
            **identify_patches(config),
        },
        read=read,
        grid=grid,
    )


def read_idx(path: Path, num_axes: int) -> np.ndarray:
    """Read one IDX file of unsigned bytes, compressed with gzip or plain.

    Args:
      path: The file.
      num_axes: Number of axes it must have.

    Returns:
      uint8 array.

    Raises:
      ValueError: The file cannot be read, is damaged, or is not such a file.
    """
    contents = _read_bytes(path)
    shape = _parse_shape(path, contents, num_axes)
    values = np.frombuffer(contents, np.uint8, offset=_count_header_bytes(num_axes))
    if values.size != math.prod(shape) or values.size == 0:
        raise ValueError(
            f"{path} holds {values.size} values; expected {math.prod(shape)} (at least one) for "
            f"shape {shape}"
        )
    return values.reshape(shape)


def _read_bytes(path: Path, count: int = -1) -> bytes:
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            return file.read(count)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}; expected an IDX file") from error


def _count_header_bytes(num_axes: int) -> int:
    return 4 * (1 + num_axes)


def _parse_shape(path: Path, contents: bytes, num_axes: int) -> tuple[int, ...]:
    magic, header_bytes = bytes((0, 0, _UNSIGNED_BYTE, num_axes)), _count_header_bytes(num_axes)
    if contents[:4] != magic or len(contents) < header_bytes:
        raise ValueError(
            f"{path} begins with {contents[:4].hex()!r}; expected the IDX header "
            f"{magic.hex()!r} (unsigned bytes, {num_axes} axes)"
        )
    return struct.unpack(f">{num_axes}I", contents[4:header_bytes])


def _describe(labels: dict[Split, np.ndarray], grid: PatchGrid | None) -> Contents:
    return Contents(
        "classification",
        num_values=256,
        num_classes=1 + max(int(values.max()) for values in labels.values()),
        patch_values=grid.patch_values if grid else 0,
    )


def _read_labels(files: dict[Split, tuple[Path, Path]]) -> dict[Split, np.ndarray]:
    return {split: read_idx(labels, 1) for split, (_, labels) in files.items()}


def _find_grid(config: DataConfig, files: dict[Split, tuple[Path, Path]]) -> PatchGrid | None:
    """Return how the training images fall into patches, None without patches."""
    if not config.patch_size:
        return None
    images, _ = files["train"]
    _, height, width = _parse_shape(images, _read_bytes(images, _count_header_bytes(3)), 3)
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
    if not folder.is_dir():
        raise ValueError(f"source='idx:{folder}': no such folder")
    found = sorted(folder.glob(f"{prefix}*"))
    if len(found) != 1:
        raise ValueError(
            f"source='idx:{folder}': found {[file.name for file in found]}; expected one file "
            f"whose name begins with {prefix!r}"
        )
    return found[0]
