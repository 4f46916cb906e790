"""Files of one item a line."""

import codecs
from collections.abc import Iterator
from pathlib import Path

from sparsejax.data.files import open_unpacked

_MOST_LINE_BYTES = 16 << 20


def read_lines(path: Path) -> Iterator[bytes]:
    r"""Yield the lines of a file without their ends, \n or \r\n; other breaks are part of a line.

    A byte-order mark of UTF-8 at the beginning is dropped.

    Args:
      path: The file, unpacked if its name ends with `.gz`.

    Yields:
      The lines.

    Raises:
      ValueError: The file cannot be read, or a line has more than 16 MiB.
    """
    with open_unpacked(path, "one item a line") as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        number = 0
        while line := file.readline(_MOST_LINE_BYTES + 1):
            number += 1
            if len(line) > _MOST_LINE_BYTES:
                raise ValueError(
                    f"{path}, line {number} is longer than {_MOST_LINE_BYTES:,} bytes; "
                    "expected one item a line"
                )
            yield line.removesuffix(b"\r\n").removesuffix(b"\n")
