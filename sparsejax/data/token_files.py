"""Token files on disk: written once from a source, and read by `store.py`.

The task decides how examples are stored.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sparsejax.data.pieces import join_pieces
from sparsejax.data.source import Contents, Example
from sparsejax.data.tokenizer import Tokenizer

TOKENS, OFFSETS, LABELS = "tokens.bin", "offsets.npy", "labels.npy"
_GROUP_BYTES = 4 << 20


def write_examples(
    folder: Path, examples: Iterator[Example], tokenizer: Tokenizer, contents: Contents
) -> None:
    """Write a split as its task asks for.

    Args:
      folder: Existing folder for the files.
      examples: The split.
      tokenizer: Encodes the documents.
      contents: What the examples are.

    Raises:
      ValueError: A label or a value is out of range, or an example does not say what is hidden.
    """
    if contents.task == "language_model":
        write_stream(folder, examples, tokenizer)
    else:
        if contents.task == "masked_language_model":
            examples = map(_check_hidden, examples)
        # Without classes every label is 0.
        write_documents(folder, examples, tokenizer, contents.num_classes or 1)


def write_stream(folder: Path, examples: Iterator[Example], tokenizer: Tokenizer) -> None:
    """Write a language-model corpus as one stream, a separator after each document.

    Args:
      folder: Existing folder for the files.
      examples: The corpus.
      tokenizer: Encodes the documents.

    Raises:
      ValueError: A value is out of range.
    """
    separator = np.array([tokenizer.separator], tokenizer.dtype).tobytes()
    if tokenizer.whole_documents:
        examples = join_pieces(examples)
    with open(folder / TOKENS, "wb") as file:
        for example, documents in _encode_examples(examples, tokenizer):
            for tokens in documents:
                file.write(tokens.astype(tokenizer.dtype).tobytes())
            if example.complete:
                file.write(separator)


def write_documents(
    folder: Path, examples: Iterator[Example], tokenizer: Tokenizer, num_classes: int
) -> None:
    """Write labelled documents end to end, with their offsets and labels.

    Args:
      folder: Existing folder for the files.
      examples: The split.
      tokenizer: Encodes the documents.
      num_classes: Labels are in [0, num_classes).

    Raises:
      ValueError: A label or a value is out of range.
    """
    lengths, labels = [0], []
    with open(folder / TOKENS, "wb") as file:
        for example, documents in _encode_examples(examples, tokenizer):
            if not 0 <= example.label < num_classes:
                raise ValueError(
                    f"example {len(labels)} has label={example.label}; expected a class in "
                    f"[0, {num_classes})"
                )
            for tokens in documents:
                file.write(tokens.astype(tokenizer.dtype).tobytes())
                lengths.append(tokens.size)
            labels.append(example.label)
    np.save(folder / OFFSETS, np.cumsum(lengths, dtype=np.int64))
    np.save(folder / LABELS, np.array(labels, np.int32))


def _check_hidden(example: Example) -> Example:
    if len(example.documents) != 2 or not np.isin(example.documents[1], (0, 1)).all():
        raise ValueError(
            "an example of a masked language model must be values and which of them are hidden, "
            f"0 or 1, got {example.documents!r:.60}"
        )
    return example


def _encode_examples(
    examples: Iterator[Example], tokenizer: Tokenizer
) -> Iterator[tuple[Example, list[np.ndarray]]]:
    number = itertools.count()
    for group in _group_examples(examples):
        encoded = iter(tokenizer.encode([text for item in group for text in item.documents]))
        for example in group:
            documents = [next(encoded) for _ in example.documents]
            _check_ids(documents, tokenizer.vocab_size, next(number))
            yield example, documents


def _check_ids(documents: list[np.ndarray], vocab_size: int, number: int) -> None:
    for ids in documents:
        if ids.dtype.kind not in "ui" or ids.ndim != 1:
            raise ValueError(
                f"example {number} is {ids.dtype}{list(ids.shape)}; expected whole numbers along "
                "one axis"
            )
        if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
            raise ValueError(
                f"example {number} has values from {ids.min()} to {ids.max()}; expected values in "
                f"[0, {vocab_size})"
            )


def _group_examples(examples: Iterator[Example]) -> Iterator[list[Example]]:
    # Enough text at once to keep the tokenizer's threads busy, little enough for its memory.
    group, size = [], 0
    for example in examples:
        group.append(example)
        size += sum(len(document) for document in example.documents)
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
