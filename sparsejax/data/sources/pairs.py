"""Parallel text for translation: two files per split, one sentence per line."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from sparsejax.data.cache import identify_files
from sparsejax.data.config import DataConfig
from sparsejax.data.lines import read_lines
from sparsejax.data.source import Contents, Example, Options, Source, Split

OPTIONS = Options({"tokenizer", "train_split", "validation_split", "truncate"})

_SIDES = ("src", "tgt")


def describe_pairs(config: DataConfig) -> Contents:
    """Describe the set without reading it.

    Args:
      config: Settings with `source="pairs:/folder"`.

    Returns:
      Its contents.
    """
    return Contents("translation")


def open_pairs(config: DataConfig) -> Source:
    """Open a folder with `train.src`, `train.tgt`, `validation.src` and `validation.tgt`.

    Line n of a `tgt` file translates line n of its `src` file; both are UTF-8. A line may be empty,
    and a carriage return before a line break belongs to it.

    Args:
      config: Settings with `source="pairs:/folder"`; split names are the stems of the file names.

    Returns:
      The set: a sentence and its translation per example.

    Raises:
      ValueError: A file is missing, has other lines than its twin, or is not text.
    """
    folder = Path(config.rest)
    names = {
        "train": config.train_split or "train",
        "validation": config.validation_split or "validation",
    }
    files = {split: [folder / f"{name}.{side}" for side in _SIDES] for split, name in names.items()}
    for file in itertools.chain(*files.values()):
        if not file.is_file():
            raise ValueError(f"source={config.source!r}: {file.name} is missing")

    def read(split: Split) -> Iterator[Example]:
        twins = itertools.zip_longest(*map(read_lines, files[split]))
        for number, lines in enumerate(twins, 1):
            if None in lines:
                ended = files[split][lines.index(None)]
                raise ValueError(
                    f"{ended} ends after line {number - 1} and its twin does not; expected a "
                    "translation in every line"
                )
            for line, file in zip(lines, files[split], strict=True):
                _check_line(line, file, number)
            yield Example(lines)

    found = itertools.chain(*files.values())
    return Source(
        contents=describe_pairs(config),
        identity={"pairs": identify_files((file.name, file) for file in found)},
        read=read,
    )


def _check_line(line: bytes, path: Path, number: int) -> None:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}, line {number} is not UTF-8 at byte {error.start}; expected one sentence per "
            "line in UTF-8"
        ) from error
    if b"\0" in line:
        raise ValueError(f"{path}, line {number} holds the byte 0; expected text, which has none")
