"""Rows of tables in memory of Apache Arrow, read a few at a time."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow

# Pictures are large, and as Python's objects they are copies.
_NUM_ROWS = 64


@contextlib.contextmanager
def refuse_damaged(path: Path, expected: str) -> Iterator[None]:
    """Say in one line which file could not be read.

    Args:
      path: The file.
      expected: What it should be.

    Raises:
      ValueError: Arrow cannot read it.
    """
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} cannot be read: {reason}; expected {expected}") from error


def check_columns(path: Path, schema: "pyarrow.Schema", keys: tuple[str, ...]) -> None:
    """Refuse a table without a column.

    Args:
      path: Of the table.
      schema: Of the table.
      keys: Names of columns; an empty one stands for none.

    Raises:
      ValueError: A column is missing, or there twice.
    """
    for key in filter(None, keys):
        if schema.names.count(key) != 1:
            columns = ", ".join(f"{field.name}: {field.type}" for field in schema)
            raise ValueError(f"{path} has no column {key!r}, but {columns}; expected it")


def iterate_rows(batch: "pyarrow.RecordBatch", keys: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield the values of some columns, row by row.

    Args:
      batch: Of a table.
      keys: Names of columns; an empty one stands for None in every row.

    Yields:
      Values as Python has them.
    """
    for start in range(0, batch.num_rows, _NUM_ROWS):
        part = batch.slice(start, _NUM_ROWS)
        columns = [
            part.column(key).to_pylist() if key else itertools.repeat(None, part.num_rows)
            for key in keys
        ]
        yield from zip(*columns, strict=True)
