"""Texts in a column of Apache Parquet files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsejax.data.arrow import check_columns, iterate_rows, refuse_damaged
from sparsejax.data.config import DataConfig
from sparsejax.data.rows import TEXT_OPTIONS, Table, describe_texts, open_texts
from sparsejax.data.source import Contents, Options, Source

OPTIONS = Options(TEXT_OPTIONS)

_EXPECTED = "a Parquet file"
_NUM_ROWS = 1024


def describe_parquet(config: DataConfig) -> Contents:
    """Describe the texts; the labels are read if `label_key` names them.

    Args:
      config: Settings with `source="parquet:/path"`.

    Returns:
      Their contents.

    Raises:
      ValueError: A file is missing or damaged or has no such column, if there are labels.
    """
    return describe_texts(config, _TABLE)


def open_parquet(config: DataConfig) -> Source:
    """Open a file, or every `*.parquet` below a folder; memory holds a few rows at a time.

    A text of a corpus may be empty: sets whose rows are lines have such.

    Args:
      config: Settings with `source="parquet:/path"`; `input_key` names the column of the text
        (`"text"` if empty), `label_key` one of labels, which are whole numbers or names.

    Returns:
      A corpus, or texts to be classified if `label_key` is set.

    Raises:
      ValueError: A file is missing, damaged, or has no such column, or a row has no text; the last
        is found when it is read.
    """
    return open_texts(config, _TABLE)


def _read(path: Path, keys: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    from pyarrow import parquet

    with refuse_damaged(path, _EXPECTED), parquet.ParquetFile(path, memory_map=True) as file:
        check_columns(path, file.schema_arrow, keys)
        for batch in file.iter_batches(_NUM_ROWS, columns=[key for key in keys if key]):
            yield from iterate_rows(batch, keys)


_TABLE = Table("row", (".parquet",), _read, may_be_empty=True)
