"""TFDS data sets, read without TensorFlow from ArrayRecord files prepared beforehand."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from sparsejax.data.cache import hash_json
from sparsejax.data.config import DataConfig
from sparsejax.data.patches import (
    PatchGrid,
    find_grid,
    flatten_image,
    identify_patches,
    read_patches,
)
from sparsejax.data.source import Contents, Example, Options, Source, Split
from sparsejax.data.tfds_builders import find_builder, make_builder

OPTIONS = Options(
    {
        *("tokenizer", "train_split", "validation_split", "input_key", "label_key", "download"),
        *("truncate", "mask_fraction", "patch_size", "image_size"),
    },
    with_patches=("image_channels", "random_crop", "random_flip"),
)


class _Fields(NamedTuple):
    """The features of a set that are used."""

    input_key: str
    label_key: str
    image: bool
    num_classes: int


def describe_tfds(config: DataConfig) -> Contents:
    """Describe a set by what TFDS knows of it; it may be neither prepared nor downloaded.

    Args:
      config: Settings with `source="tfds:NAME[/config]"`.

    Returns:
      Its contents.

    Raises:
      ValueError: TFDS does not know the set, or it lacks the feature asked for, or has no images
        that fit the patches.
    """
    fields, grid = _understand(config, make_builder(config).info)
    return _describe(fields, grid)


def open_tfds(config: DataConfig) -> Source:
    """Open a TFDS set as a labelled set of texts or images, or as a corpus of texts.

    Images become sequences of grey pixels, row by row, or of patches with all their channels.

    Args:
      config: Settings with `source="tfds:NAME[/config]"`.

    Returns:
      The set.

    Raises:
      ValueError: The set is neither prepared nor to be downloaded, is damaged, lacks the split or
        feature asked for, or has no images that fit the patches.
    """
    builder = find_builder(config)
    info = builder.info
    fields, grid = _understand(config, info)
    names = {
        "train": config.train_split or "train",
        "validation": config.validation_split
        or ("validation" if "validation" in info.splits else "test"),
    }

    def read(split: Split) -> Iterator[Example]:
        to_document = _to_bytes
        if fields.image:
            to_document = functools.partial(flatten_image, image_size=config.image_size)
        if grid is not None:
            to_document = functools.partial(read_patches, grid=grid, image_size=config.image_size)
        keys = (fields.input_key, fields.label_key)
        return read_examples(builder, names[split], *keys, to_document)

    return Source(
        contents=_describe(fields, grid),
        identity={
            "tfds": info.full_name,
            "files": _describe_files(builder),
            "splits": names,
            "keys": [fields.input_key, fields.label_key],
            # Absent where they do nothing, so that caches keep their names.
            **({"image_size": config.image_size} if config.image_size else {}),
            **identify_patches(config),
        },
        read=read,
        grid=grid,
    )


def _describe(fields: _Fields, grid: PatchGrid | None) -> Contents:
    return Contents(
        "classification" if fields.label_key else "language_model",
        num_values=256 if fields.image else None,
        num_classes=fields.num_classes,
        patch_values=grid.patch_values if grid else 0,
    )


def _understand(config: DataConfig, info: Any) -> tuple[_Fields, PatchGrid | None]:
    """Return the features that are used, and how images fall into patches if they do."""
    fields = _choose_fields(config, dict(info.features.items()), info.supervised_keys)
    if fields.image and config.tokenizer != "bytes":
        raise ValueError(
            f"tokenizer={config.tokenizer!r} does not apply to the images of {config.source}; "
            "leave it at 'bytes'"
        )
    if config.image_size and not fields.image:
        raise ValueError(
            f"image_size={config.image_size} does not apply to the texts of {config.source}; "
            "leave it at 0"
        )
    grid = None
    if config.patch_size:
        if not fields.image:
            raise ValueError(
                f"patch_size={config.patch_size}: {config.source} has texts in "
                f"{fields.input_key!r}; expected images, or 0"
            )
        grid = find_grid(config, info.features[fields.input_key].shape)
    return fields, grid


def read_examples(
    builder: Any,
    split: str,
    input_key: str,
    label_key: str,
    to_document: Callable[[Any], bytes | np.ndarray],
) -> Iterator[Example]:
    """Yield the examples of a prepared split in the order of its files.

    Args:
      builder: A prepared TFDS builder.
      split: Name of the split, a TFDS slice included.
      input_key: Feature that becomes the document.
      label_key: Feature that becomes the label, or empty.
      to_document: Converts the feature's value.

    Yields:
      The examples.

    Raises:
      ValueError: The split does not exist, its format is not ArrayRecord, or it is damaged.
    """
    try:
        records = builder.as_data_source(split)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"split={split!r}: {builder.info.full_name} has {sorted(builder.info.splits)}"
        ) from error
    except NotImplementedError as error:
        raise ValueError(
            f"{builder.data_path} is in TFDS's {builder.info.file_format} format; expected "
            "array_record: prepare the set again with file_format='array_record'"
        ) from error
    try:
        for index, record in enumerate(records):
            # The reader answers None, not an error, for what a cut-off file lacks.
            if record[input_key] is None:
                raise IndexError(f"example {index} is missing")
            label = int(record[label_key]) if label_key else 0
            yield Example((to_document(record[input_key]),), label)
    except (RuntimeError, IndexError) as error:
        raise ValueError(
            f"{builder.data_path} is damaged in split {split!r} ({error}); delete the folder and "
            "prepare the set again"
        ) from error


def _choose_fields(
    config: DataConfig, features: dict[str, Any], supervised_keys: tuple | None
) -> _Fields:
    """Find input and label: as configured, else as declared, else the only ones possible."""
    import tensorflow_datasets as tfds

    found = ", ".join(f"{name}: {type(value).__name__}" for name, value in features.items())
    inputs = [
        k for k, v in features.items() if isinstance(v, (tfds.features.Text, tfds.features.Image))
    ]
    labels = [k for k, v in features.items() if isinstance(v, tfds.features.ClassLabel)]
    declared_input, declared_label = supervised_keys or ("", "")
    input_key = config.input_key or declared_input or _get_only(inputs)
    if input_key not in inputs:
        raise ValueError(
            f"input_key={config.input_key!r}: {config.source} has {found}; expected the name of "
            "a Text or Image feature"
        )
    image = isinstance(features[input_key], tfds.features.Image)
    # A corpus may declare its text as the label too.
    declared_label = declared_label if declared_label in labels else ""
    label_key = config.label_key or declared_label or _get_only(labels)
    if label_key not in labels and (config.label_key or image):
        raise ValueError(
            f"label_key={config.label_key!r}: {config.source} has {found}; expected the name of a "
            "ClassLabel feature"
        )
    num_classes = features[label_key].num_classes if label_key else 0
    return _Fields(input_key, label_key, image, num_classes)


def _get_only(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ""


def _describe_files(builder: Any) -> str:
    folder = builder.data_path
    files = sorted(folder.iterdir()) if folder.exists() else []
    return hash_json([(file.name, file.stat().length) for file in files])


def _to_bytes(text: bytes | str) -> bytes:
    return text.encode() if isinstance(text, str) else text
