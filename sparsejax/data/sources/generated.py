"""Data sets that are generated on the spot, as TFDS sets for any reader of such sets."""

import contextlib
import dataclasses
import io
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from sparsejax.data.cache import cached_folder
from sparsejax.data.config import DataConfig
from sparsejax.data.source import Example, Source, Split
from sparsejax.data.sources.tfds import read_examples

_SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(eq=False)
class GeneratedConfig(tfds.core.BuilderConfig):
    """Size of one variant of a generated set.

    Attributes:
        train_examples: Size of the training split.
        train_per_test_example: How many times smaller each of the two other splits is.
    """

    train_examples: int = 0
    train_per_test_example: ClassVar[int] = 1

    @property
    def split_sizes(self) -> dict[str, int]:
        """Return the number of examples of each split."""
        small = self.train_examples // self.train_per_test_example
        return dict(zip(_SPLITS, (self.train_examples, small, small), strict=True))


def open_generated(
    config: DataConfig,
    builder_class: type[tfds.core.GeneratorBasedBuilder],
    *,
    variant: str,
    train_examples: int,
    input_key: str,
    num_values: int,
    num_classes: int,
) -> Source:
    """Open a generated set, writing it into `data_dir` on first use.

    Args:
        config: Settings of the source.
        builder_class: Its builder, whose variants are `GeneratedConfig`s.
        variant: Name of the published variant.
        train_examples: Size of the training split, published or not.
        input_key: Feature that becomes the document: uint8 values, flattened row by row.
        num_values: Values are below it.
        num_classes: Number of labels, which are the feature `"label"`.

    Returns:
        The set.

    Raises:
        ValueError: `validation_split` is not a split.
    """
    validation = config.validation_split or "validation"
    if validation not in _SPLITS[1:]:
        raise ValueError(f"validation_split={validation!r}: expected 'validation' or 'test'")
    sized = _resize(builder_class, variant, train_examples)
    version = str(builder_class.VERSION)
    folder = Path(config.data_dir, builder_class.name, sized.name, version)

    def read(split: Split) -> Iterator[Example]:
        cached_folder(folder, lambda temporary: _prepare(builder_class, sized, temporary))
        builder = tfds.builder_from_directory(folder)
        name = "train" if split == "train" else validation
        return read_examples(builder, name, input_key, "label", np.ravel)

    return Source(
        task="classification",
        identity={config.kind: sized.name, "version": version, "validation": validation},
        read=read,
        num_values=num_values,
        num_classes=num_classes,
    )


def _resize(
    builder_class: type[tfds.core.GeneratorBasedBuilder], variant: str, train_examples: int
) -> GeneratedConfig:
    published = next(known for known in builder_class.BUILDER_CONFIGS if known.name == variant)
    assert isinstance(published, GeneratedConfig)
    if train_examples == published.train_examples:
        return published
    return dataclasses.replace(
        published, name=f"{variant}_{train_examples}", train_examples=train_examples
    )


def _prepare(
    builder_class: type[tfds.core.GeneratorBasedBuilder], variant: GeneratedConfig, folder: Path
) -> None:
    tfds.disable_progress_bar()
    try:
        # TFDS announces on stdout the temporary folder, which is gone in the end.
        with (
            tempfile.TemporaryDirectory(dir=folder) as data_dir,
            contextlib.redirect_stdout(io.StringIO()),
        ):
            builder = builder_class(config=variant, data_dir=data_dir, file_format="array_record")
            builder.download_and_prepare()
            for file in Path(builder.data_path).iterdir():
                shutil.move(file, folder)
    finally:
        tfds.enable_progress_bar()
