"""Long Range Arena's document retrieval: do two papers of the ACL anthology cite each other?"""

from collections.abc import Iterator
from pathlib import Path

from sparsejax.data.cache import identify_files
from sparsejax.data.config import DataConfig
from sparsejax.data.lines import read_lines
from sparsejax.data.source import Contents, Example, Options, Source, Split

OPTIONS = Options({"tokenizer", "train_split", "validation_split", "truncate"})

_NUM_FIELDS = 5


def describe_aan(config: DataConfig) -> Contents:
    """Describe the set without reading it.

    Args:
      config: Settings with `source="aan:/path"`.

    Returns:
      Its contents.
    """
    return Contents("matching", num_classes=2)


def open_aan(config: DataConfig) -> Source:
    """Open a folder with `new_aan_pairs.{train,eval,test}.tsv`.

    Each line is `label, id1, id2, text1, text2`, separated by tabs; texts are taken as published.

    Args:
      config: Settings with `source="aan:/path"`; split names are the middle of the file names.

    Returns:
      The set: two documents and one of two labels per example.

    Raises:
      ValueError: A file is missing or a line is not of this form.
    """
    folder = Path(config.rest)
    names = {
        "train": config.train_split or "train",
        "validation": config.validation_split or "eval",
    }
    files = {split: folder / f"new_aan_pairs.{name}.tsv" for split, name in names.items()}
    for file in files.values():
        if not file.is_file():
            raise ValueError(f"source={config.source!r}: {file.name} is missing")

    def read(split: Split) -> Iterator[Example]:
        for number, line in enumerate(read_lines(files[split]), 1):
            yield _parse_line(line, files[split], number)

    return Source(
        contents=describe_aan(config),
        identity={"aan": identify_files((file.name, file) for file in files.values())},
        read=read,
    )


def _parse_line(line: bytes, path: Path, number: int) -> Example:
    fields = line.split(b"\t")
    if len(fields) != _NUM_FIELDS:
        raise ValueError(
            f"{path}, line {number} has {len(fields)} fields; expected {_NUM_FIELDS}: label, id1, "
            "id2, text1, text2, separated by tabs"
        )
    try:
        label = float(fields[0])
    except ValueError:
        label = -1.0
    if label not in (0.0, 1.0):
        raise ValueError(f"{path}, line {number} has the label {fields[0][:40]!r}; expected 0 or 1")
    return Example((fields[3], fields[4]), int(label))
