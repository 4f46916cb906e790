"""What every source of data offers: examples of each split, before any tokenizer."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Literal, NamedTuple

import numpy as np

from sparsejax.batch import Task
from sparsejax.data.patches import PatchGrid
from sparsejax.data.shards import Shard

type Split = Literal["train", "validation"]
type EvaluatedSplit = Split | Literal["all"]


class Options(NamedTuple):
    """The options of `DataConfig` that apply to a source beyond the common ones.

    Any other is refused, never ignored.

    Attributes:
      always: Options that may be set.
      with_patches: Options that may be set where `patch_size` is above 0.
      tokenizers: Values of `tokenizer`, as messages show them.
    """

    always: Set[str]
    with_patches: tuple[str, ...] = ()
    tokenizers: tuple[str, ...] = ("bytes", "bpe:N", "file:/path")


class Contents(NamedTuple):
    """What the examples of a source are.

    Attributes:
      task: What the examples are for; settings may make a masked one of a language model. One that
        is masked from the beginning has values for ids.
      num_values: Number of distinct pixels or symbols; None for text.
      num_classes: Number of labels; 0 for a language model and for translation.
      patch_values: Values of a patch of an image; 0 for anything else.
    """

    task: Task
    num_values: int | None = None
    num_classes: int = 0
    patch_values: int = 0


class Example(NamedTuple):
    """One raw example.

    Attributes:
      documents: One document, or two: to match, or a sentence and its translation, or values and
        which of them are hidden (1, others 0). Text is UTF-8
        `bytes`; pixels and symbols are uint8[length], each below the source's `num_values`;
        patches lie one after another.
      label: Class of the example; 0 where there are no classes.
      complete: False when the document goes on in the next example (language models only).
    """

    documents: tuple[bytes | np.ndarray, ...]
    label: int = 0
    complete: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A data set before tokenization.

    Attributes:
      contents: What its examples are.
      identity: JSON value that changes whenever the examples may have; key of the caches.
      read: Opens a split and yields its examples, always in the same order.
      grid: How the documents are patches of images; None if they are not.
      shards: By split, files that hold the ids already: they are mapped, and none is copied into a
        cache. Language models only.
      fingerprint: What else must be equal when a run is resumed.
    """

    contents: Contents
    identity: dict[str, object]
    read: Callable[[Split], Iterator[Example]]
    grid: PatchGrid | None = None
    shards: Mapping[Split, Sequence[Shard]] | None = None
    fingerprint: dict[str, str | int] = dataclasses.field(default_factory=dict)
