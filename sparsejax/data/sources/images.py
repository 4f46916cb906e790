"""Image files in folders, one for each class, as torchvision's ImageFolder has them."""

import operator
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sparsejax.data.cache import identify_files
from sparsejax.data.config import DataConfig
from sparsejax.data.files import hash_name, list_files
from sparsejax.data.pictures import identify_images, prepare_images
from sparsejax.data.rows import Classes, Documents, describe_rows
from sparsejax.data.source import Contents, Example, Options, Source, Split
from sparsejax.data.splits import divide

OPTIONS = Options(
    {
        *("train_split", "validation_split", "validation_fraction"),
        *("truncate", "patch_size", "image_size"),
    },
    with_patches=("image_channels", "random_crop", "random_flip"),
)

_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")


def describe_images(config: DataConfig) -> Contents:
    """Describe the images: their classes, and how large a patch is.

    Args:
      config: Settings with `source="images:/folder"`.

    Returns:
      Their contents.

    Raises:
      ValueError: A folder is missing or empty, or the first image does not fit the patches.
    """
    folders, _ = _find_folders(config)
    classes = _list_classes(folders["train"])
    first = _list_images(folders["train"] / classes[0])[0]
    return _describe(classes, _prepare(config, first))


def open_images(config: DataConfig) -> Source:
    """Open a folder with a folder of images for each class, or with such folders for each split.

    The folders of splits are `train` and `validation`, `valid`, `val`, `dev` or `test`. Without
    them images are held out by the hash of their paths. Classes are numbered in the order of their
    names. Images with one channel are grey, others RGB; all must have as many, unless
    `image_channels` says how many to make of them. Files that do not end as images do are left out.

    Args:
      config: Settings with `source="images:/folder"`.

    Returns:
      The set; documents are grey pixels row by row, or patches.

    Raises:
      ValueError: A folder is missing or empty, classes differ between splits, or images do not fit
        the patches; what stands in other files than the first is found when they are read.
    """
    folders, fraction = _find_folders(config)
    classes = _list_classes(folders["train"])
    files = {split: _list_examples(folder, classes) for split, folder in folders.items()}
    documents = _prepare(config, files["train"][0].path)
    for split in files if fraction else ():
        files[split] = [x for x in files[split] if (x.position < fraction) == (split != "train")]
        if not files[split]:
            raise ValueError(
                f"source={config.source!r}: the {split} split has no image, with "
                f"validation_fraction={fraction} held out by the hash of their names; expected some"
            )

    def read(split: Split) -> Iterator[Example]:
        for file in files[split]:
            try:
                content = file.path.read_bytes()
                document = documents.convert(documents.check(content))
            except OSError as error:
                raise ValueError(f"{file.path} cannot be read: {error.strerror}") from error
            except ValueError as error:
                raise ValueError(f"{file.path} {error}") from error
            yield Example((document,), file.label)

    return Source(
        contents=_describe(classes, documents),
        identity={
            "images": {
                split: identify_files(
                    (f"{file.label}/{file.path.name}", file.path) for file in found
                )
                for split, found in files.items()
            },
            **identify_images(config),
        },
        read=read,
        grid=documents.grid,
    )


class _ImageFile(NamedTuple):
    """An example before it is read; its position, in [0, 1), says whether it is held out."""

    path: Path
    label: int
    position: float


def _describe(classes: list[str], documents: Documents) -> Contents:
    return describe_rows(Classes(len(classes)), documents)


def _prepare(config: DataConfig, first: Path) -> Documents:
    try:
        return prepare_images(config, first.read_bytes(), str(first))
    except OSError as error:
        raise ValueError(f"{first} cannot be read: {error.strerror}") from error


def _find_folders(config: DataConfig) -> tuple[dict[Split, Path], float]:
    """Return the folder of classes of each split, and the share that is held out if it is one."""
    root = Path(config.rest)
    if not root.is_dir():
        raise ValueError(f"source={config.source!r}: no such folder")
    names = _list_classes(root)
    division = divide(config, names, operator.eq)
    if (config.train_split or "train") not in names:
        return {"train": root, "validation": root}, division.fraction
    return {split: root / found[0] for split, found in division.members.items()}, division.fraction


def _list_classes(folder: Path) -> list[str]:
    names = sorted(x.name for x in folder.iterdir() if x.is_dir() and not x.name.startswith("."))
    if not names:
        raise ValueError(f"{folder} holds no folders; expected one for each class")
    return names


def _list_examples(folder: Path, classes: list[str]) -> list[_ImageFile]:
    numbers = {name: number for number, name in enumerate(classes)}
    found = []
    for name in _list_classes(folder):
        if name not in numbers:
            raise ValueError(
                f"{folder / name} is of a class that the train split lacks; expected one of its "
                f"{len(classes)}"
            )
        for path in _list_images(folder / name):
            position = hash_name(path.relative_to(folder).as_posix())
            found.append(_ImageFile(path, numbers[name], position))
    return found


def _list_images(folder: Path) -> list[Path]:
    files = list_files(folder, _SUFFIXES)
    if not files:
        raise ValueError(f"{folder} holds no image; expected files that end with {_SUFFIXES}")
    return files
