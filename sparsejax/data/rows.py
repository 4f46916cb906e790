"""Sets whose files hold rows of named values: a text or an image, and maybe a label."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsejax.data.cache import identify_files
from sparsejax.data.config import DataConfig
from sparsejax.data.files import hash_fraction
from sparsejax.data.patches import PatchGrid
from sparsejax.data.source import Contents, Example, Source, Split
from sparsejax.data.splits import Division, divide_files, find_files

TEXT_OPTIONS = frozenset(
    {
        *("tokenizer", "train_split", "validation_split", "validation_fraction"),
        *("input_key", "label_key", "truncate", "mask_fraction"),
    }
)
"""Options of sources that hold texts, with or without labels."""

# A model has a row of weights for each.
_MOST_CLASSES = 1 << 20


class Table(NamedTuple):
    """How rows of one format are read.

    Attributes:
      unit: What messages call a row; the first has the number 1.
      suffixes: How the names of files end.
      read: File, keys -> tuples of the values of these keys, None for an empty key.
      may_be_empty: Whether a text without labels may have no characters.
    """

    unit: str
    suffixes: tuple[str, ...]
    read: Callable[[Path, tuple[str, ...]], Iterator[tuple[Any, ...]]]
    may_be_empty: bool = False


class Classes(NamedTuple):
    """The labels of a set.

    Attributes:
      num_classes: Labels that are numbers lie in [0, num_classes).
      names: Labels that are texts, in order; empty where they are numbers.
    """

    num_classes: int
    names: tuple[str, ...] = ()


class Documents(NamedTuple):
    """What becomes of the values of rows.

    Attributes:
      check: Value -> bytes, or a ValueError that says what the row has instead.
      convert: Those bytes -> document.
      num_values: As in `Contents`.
      grid: As in `Source`.
    """

    check: Callable[[Any], bytes]
    convert: Callable[[bytes], bytes | np.ndarray] = bytes
    num_values: int | None = None
    grid: PatchGrid | None = None


def describe_texts(config: DataConfig, table: Table) -> Contents:
    """Describe texts; their files are read if they have labels.

    Args:
      config: Settings with `source="kind:/path"`.
      table: How the files are read.

    Returns:
      Their contents.

    Raises:
      ValueError: As `open_texts`, for what the labels need.
    """
    if not config.label_key:
        return Contents("language_model")
    names = find_files(config, table.suffixes)
    division = divide_files(config, names)
    return describe_rows(_find_classes(config, table, division), Documents(bytes))


def open_texts(config: DataConfig, table: Table) -> Source:
    """Open files of texts: one file, or those below a folder.

    Args:
      config: Settings with `source="kind:/path"`; `input_key` is the text's, `"text"` if empty.
      table: How the files are read.

    Returns:
      A corpus, or texts to be classified if `label_key` is set.

    Raises:
      ValueError: A file is missing, or not as expected; what stands in rows is found when they are
        read.
    """
    names = find_files(config, table.suffixes)
    division = divide_files(config, names)
    classes = _find_classes(config, table, division)
    return open_rows(
        config,
        table,
        division,
        keys=(config.input_key or "text", config.label_key),
        classes=classes,
        documents=make_text_documents(may_be_empty=table.may_be_empty and classes is None),
        identity={"names": list(names.values())},
    )


def make_text_documents(*, may_be_empty: bool) -> Documents:
    """Say how texts become documents.

    Args:
      may_be_empty: Whether one may have no characters.

    Returns:
      Documents of UTF-8.
    """
    return Documents(functools.partial(encode_text, may_be_empty=may_be_empty))


def describe_rows(classes: Classes | None, documents: Documents) -> Contents:
    """Describe rows by their labels and documents.

    Args:
      classes: The labels; None without.
      documents: What the rows become.

    Returns:
      Their contents.
    """
    return Contents(
        "language_model" if classes is None else "classification",
        num_values=documents.num_values,
        num_classes=classes.num_classes if classes else 0,
        patch_values=documents.grid.patch_values if documents.grid else 0,
    )


def open_rows(
    config: DataConfig,
    table: Table,
    division: Division[Path],
    *,
    keys: tuple[str, str],
    classes: Classes | None,
    documents: Documents,
    identity: dict[str, object],
) -> Source:
    """Open rows of files.

    Rows are held out by the hash of their texts or images: rows that are alike are in one split,
    and a row stays in its own whatever is added.

    Args:
      config: Settings of the set.
      table: How the files are read.
      division: The files of each split.
      keys: Of the document and of the label; the latter is empty without labels.
      classes: The labels; None without.
      documents: What the rows become.
      identity: What else the examples depend on.

    Returns:
      The set.
    """
    fraction = division.fraction

    def read(split: Split) -> Iterator[Example]:
        empty = True
        for file in division.members[split]:
            for number, (value, label) in enumerate(table.read(file, keys), 1):
                try:
                    content = documents.check(value)
                    if fraction and (hash_fraction(content) < fraction) != (split == "validation"):
                        continue
                    document = documents.convert(content)
                    example = Example((document,), _number_label(label, classes))
                except ValueError as error:
                    raise ValueError(f"{file}, {table.unit} {number} {error}") from error
                empty = False
                yield example
        if empty:
            raise ValueError(
                f"source={config.source!r}: the {split} split has no {table.unit}"
                + (f", with validation_fraction={fraction} held out by hash" if fraction else "")
                + "; expected some"
            )

    splits = {
        split: identify_files((file.name, file) for file in files)
        for split, files in division.members.items()
    }
    return Source(
        contents=describe_rows(classes, documents),
        identity={
            config.kind: identity,
            "splits": splits,
            "fraction": fraction,
            "keys": list(keys),
            "classes": list(classes) if classes else None,
        },
        read=read,
        grid=documents.grid,
    )


def encode_text(value: Any, *, may_be_empty: bool = False) -> bytes:
    """Return a text as the bytes of a document.

    Args:
      value: The text.
      may_be_empty: Whether it may have no characters.

    Returns:
      UTF-8.

    Raises:
      ValueError: It is no text, empty, or holds what is no character of a text.
    """
    if not isinstance(value, str):
        raise ValueError(f"has {_show(value)} for a text; expected a string")
    if not (value or may_be_empty):
        raise ValueError("has an empty text; expected characters")
    if "\0" in value:
        raise ValueError("has a text with the character 0; expected text, which has none")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"has half a character at {error.start} of its text; expected Unicode"
        ) from error


def list_classes(labels: Iterable[tuple[str, Any]]) -> Classes:
    """Find what labels there are.

    Args:
      labels: Where each one stands, and what it is.

    Returns:
      As many classes as the highest number asks for, or the texts in order.

    Raises:
      ValueError: A label is neither a number from 0 nor a text, or they are not all alike.
    """
    highest, names = -1, set()
    for place, label in labels:
        if type(label) is int and 0 <= label < _MOST_CLASSES:
            highest = max(highest, label)
        elif isinstance(label, str) and label:
            names.add(label)
        else:
            raise ValueError(
                f"{place} has the label {_show(label)}; expected a whole number in [0, "
                f"{_MOST_CLASSES}) or a name"
            )
        if names and highest >= 0:
            raise ValueError(
                f"{place} has the label {_show(label)} where others are "
                f"{'names' if type(label) is int else 'numbers'}; expected one kind"
            )
    return Classes(len(names) or 1 + highest, tuple(sorted(names)))


def _find_classes(config: DataConfig, table: Table, division: Division[Path]) -> Classes | None:
    if not config.label_key:
        return None
    files = tuple(dict.fromkeys(division.members["train"] + division.members["validation"]))
    identity = identify_files((str(file), file) for file in files)
    return find_classes(table, files, config.label_key, identity)


# A run asks twice.
@functools.lru_cache(maxsize=1)
def find_classes(table: Table, files: Sequence[Path], key: str, identity: str) -> Classes:
    """Read the labels of all files.

    Args:
      table: How they are read.
      files: Of all splits.
      key: Of the label.
      identity: Of the files.

    Returns:
      What labels there are.

    Raises:
      ValueError: A row has none, or not one like the others.
    """
    return list_classes(
        (f"{file}, {table.unit} {number}", label)
        for file in files
        for number, (label,) in enumerate(table.read(file, (key,)), 1)
    )


def _number_label(label: Any, classes: Classes | None) -> int:
    if classes is None:
        return 0
    if classes.names:
        return _number_names(classes.names)[label]
    if type(label) is not int or not 0 <= label < classes.num_classes:
        raise ValueError(
            f"has the label {_show(label)}; expected a class in [0, {classes.num_classes})"
        )
    return label


@functools.lru_cache(maxsize=1)
def _number_names(names: tuple[str, ...]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def _show(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:40]}..."
