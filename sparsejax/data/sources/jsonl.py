"""Texts in JSON, one object a line, compressed with gzip or plain."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsejax.data.config import DataConfig
from sparsejax.data.lines import read_lines
from sparsejax.data.rows import TEXT_OPTIONS, Table, describe_texts, open_texts
from sparsejax.data.source import Contents, Options, Source

OPTIONS = Options(TEXT_OPTIONS)


def describe_jsonl(config: DataConfig) -> Contents:
    """Describe the texts; the labels are read if `label_key` names them.

    Args:
      config: Settings with `source="jsonl:/path"`.

    Returns:
      Their contents.

    Raises:
      ValueError: A file is missing or a line is not as expected, if there are labels.
    """
    return describe_texts(config, _TABLE)


def open_jsonl(config: DataConfig) -> Source:
    """Open a file, or every `*.jsonl` and `*.jsonl.gz` below a folder.

    Args:
      config: Settings with `source="jsonl:/path"`; `input_key` names the text (`"text"` if empty),
        `label_key` a label, which is a whole number or a name.

    Returns:
      A corpus, or texts to be classified if `label_key` is set.

    Raises:
      ValueError: A file is missing, or a line is no object with a text that is not empty; the
        latter is found when the file is read.
    """
    return open_texts(config, _TABLE)


def _read(path: Path, keys: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    for number, line in enumerate(read_lines(path), 1):
        try:
            yield _pick(line, keys)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} {error}") from error


def _pick(line: bytes, keys: tuple[str, ...]) -> tuple[Any, ...]:
    if not line:
        raise ValueError("is empty; expected a JSON object")
    try:
        # `json.loads` would guess the encoding of bytes.
        row = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error}); expected one object a line") from error
    if not isinstance(row, dict):
        raise ValueError(f"holds {line[:40].decode(errors='replace')!r}; expected a JSON object")
    for key in keys:
        if key and key not in row:
            raise ValueError(f"has no {key!r}, but {sorted(row)}; expected it in every object")
    return tuple(row[key] if key else None for key in keys)


_TABLE = Table("line", (".jsonl", ".jsonl.gz"), _read)
