"""Data sets that are generated on the spot, as TFDS sets for any reader of such sets.

What is drawn stands in `listops_grammar.py` and `pathfinder_pictures.py`; here it becomes files.
"""

import contextlib
import dataclasses
import io
import itertools
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, cast

import numpy as np
import tensorflow_datasets as tfds

from sparsejax.data.cache import cached_folder
from sparsejax.data.config import DataConfig
from sparsejax.data.listops_grammar import generate_expressions
from sparsejax.data.pathfinder_pictures import SIZE, draw_pathfinder
from sparsejax.data.progress import show_progress
from sparsejax.data.source import Contents, Example, Source, Split
from sparsejax.data.sources.tfds import read_examples
from sparsejax.data.tfds_builders import check_data_dir, silence_tfds

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


@dataclasses.dataclass(eq=False)
class ListOpsConfig(GeneratedConfig):
    """Bounds and size of one variant.

    Attributes:
      min_length: Expressions are longer.
      max_length: Expressions are shorter.
      train_examples: Size of the training split; the two others have 1/48 as many each.
    """

    min_length: int = 500
    max_length: int = 2_000
    train_examples: int = 96_000
    train_per_test_example: ClassVar[int] = 48


class ListOps(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of ListOps, for any reader of TFDS sets."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        ListOpsConfig(name="full", description="The published lengths."),
        ListOpsConfig(name="short", description="Short ones.", min_length=20, max_length=200),
    ]

    @property
    def _variant(self) -> ListOpsConfig:
        return cast(ListOpsConfig, self.builder_config)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Nested list operations on digits.",
            features=tfds.features.FeaturesDict(
                {
                    "tokens": tfds.features.Tensor(shape=(None,), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("tokens", "label"),
        )

    def _split_generators(self, dl_manager):
        # One stream cut in three, so that no expression stands in two splits.
        variant = self._variant
        sizes = variant.split_sizes
        total = sum(sizes.values())
        stream = generate_expressions(
            total, min_length=variant.min_length, max_length=variant.max_length
        )
        expressions = enumerate(show_progress(stream, "Generating ListOps", total))
        return {
            split: self._generate_examples(itertools.islice(expressions, size))
            for split, size in sizes.items()
        }

    def _generate_examples(self, expressions):
        for key, (ids, value) in expressions:
            yield key, {"tokens": np.array(ids, np.uint8), "label": value}


@dataclasses.dataclass(eq=False)
class PathfinderConfig(GeneratedConfig):
    """Size of one variant.

    Attributes:
      train_examples: Size of the training split; the two others have 1/8 as many each.
    """

    train_examples: int = 160_000
    train_per_test_example: ClassVar[int] = 8


class Pathfinder(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of Pathfinder, for any reader of TFDS sets."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [PathfinderConfig(name="full", description="The published size.")]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Two circles on the ends of one dashed path, or of two.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(SIZE, SIZE), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(names=["apart", "together"]),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        sizes = cast(PathfinderConfig, self.builder_config).split_sizes
        return {split: self._generate_examples(split, size) for split, size in sizes.items()}

    def _generate_examples(self, split, size):
        indices = show_progress(range(size), f"Generating the {split} split of Pathfinder", size)
        for index in indices:
            # Each picture has its own stream, so that no split depends on how large another is.
            pixels, label = draw_pathfinder(random.Random(f"{self.VERSION} {split} {index}"))
            yield index, {"image": pixels, "label": label}


def open_generated(
    config: DataConfig,
    builder_class: type[tfds.core.GeneratorBasedBuilder],
    *,
    contents: Contents,
    variant: str,
    train_examples: int,
    input_key: str,
) -> Source:
    """Open a generated set, writing it into `data_dir` on first use.

    Args:
      config: Settings of the source.
      builder_class: Its builder, whose variants are `GeneratedConfig`s.
      contents: What its examples are; their labels are the feature `"label"`.
      variant: Name of the published variant.
      train_examples: Size of the training split, published or not.
      input_key: Feature that becomes the document: uint8 values, flattened row by row.

    Returns:
      The set.

    Raises:
      ValueError: `validation_split` is not a split.
    """
    check_data_dir(config)
    silence_tfds()
    validation = config.validation_split or "validation"
    if validation not in _SPLITS[1:]:
        raise ValueError(f"validation_split={validation!r}: expected 'validation' or 'test'")
    sized = _resize(builder_class, variant, train_examples)
    version = str(builder_class.VERSION)
    folder = Path(config.data_path, builder_class.name, sized.name, version)

    def read(split: Split) -> Iterator[Example]:
        cached_folder(folder, lambda temporary: _prepare(builder_class, sized, temporary))
        builder = tfds.builder_from_directory(folder)
        name = "train" if split == "train" else validation
        return read_examples(builder, name, input_key, "label", np.ravel)

    return Source(
        contents=contents,
        identity={config.kind: sized.name, "version": version, "validation": validation},
        read=read,
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
    # Of its writer, as one of a full disk.
    except RuntimeError as error:
        raise OSError(str(error).partition(";")[0]) from error
    finally:
        tfds.enable_progress_bar()
