"""Files of a data set: found below a folder, opened, and spread by the hash of their names."""

import contextlib
import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast


def list_files(root: Path, suffixes: tuple[str, ...] = ("",)) -> list[Path]:
    """List the files below a folder that are not hidden.

    Args:
      root: The folder.
      suffixes: How their names may end, in lower case.

    Returns:
      Their paths, in order.

    Raises:
      ValueError: A folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(f"cannot read {error.filename!r}: {error.strerror}") from error

    files = []
    for folder, folders, names in root.walk(on_error=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [folder / name for name in names if not name.startswith(".")]
    return sorted(f for f in files if f.name.lower().endswith(suffixes) and f.is_file())


def hash_fraction(content: bytes) -> float:
    """Return a number in [0, 1) that depends on some bytes alone.

    Args:
      content: Bytes of any number, even none.

    Returns:
      The number; those of other bytes are spread evenly.
    """
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64


def hash_name(name: str) -> float:
    """Return a number in [0, 1) that depends on a name alone.

    Args:
      name: Of a file, which need not be UTF-8.

    Returns:
      As `hash_fraction`.
    """
    return hash_fraction(os.fsencode(name))


@contextlib.contextmanager
def open_unpacked(path: Path, expected: str) -> Iterator[BinaryIO]:
    """Open a file for reading, through gzip if its name ends with `.gz`.

    Args:
      path: The file.
      expected: What it should be, for the message.

    Yields:
      The open file.

    Raises:
      ValueError: It cannot be read or unpacked, at once or later.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            yield cast(BinaryIO, file)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}; expected {expected}") from error
