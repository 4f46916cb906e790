"""Folders of derived files: built once, whole or absent, and checked each time they are opened."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sparsejax.durable import write_durably
from sparsejax.strict_json import load_json

_LOGGER = logging.getLogger(__name__)
_MANIFEST = "manifest.json"
_MOST_MANIFEST_BYTES = 4 << 20


class _DamagedError(ValueError):
    """A cache is missing or not as it was written."""


def cached_folder(folder: Path, build: Callable[[Path], None]) -> str:
    """Make sure `folder` holds what `build` writes, and return the hash of its contents.

    The files are written to a temporary folder beside it and moved into place, last of all a
    manifest of sizes and SHA-256, so that a kill or a full disk leaves nothing behind that could be
    taken for the real thing. A lock lets one of several processes build while the others
    wait. What is damaged is built again, with a warning.

    Args:
      folder: Where the files belong. Other files in it stay as they are.
      build: Writes the files, and no folders, into the empty folder it is given. It must be
        deterministic.

    Returns:
      SHA-256 over the names and contents of the files, in hexadecimal.

    Raises:
      ValueError: The folder cannot be written, or what it is built from cannot be read.
    """
    with contextlib.suppress(_DamagedError):
        return _hash_folder(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = _open_lock(folder.parent / f".{folder.name}.lock")
    except OSError as error:
        raise ValueError(
            f"data_dir: cannot write to {folder.parent}: {error.strerror}; expected a folder that "
            "can be made and written"
        ) from error
    with lock, _locked(lock.fileno()):
        try:
            return _hash_folder(folder)
        except _DamagedError as error:
            if folder.exists():
                _LOGGER.warning("The cache %s is damaged (%s); building it again.", folder, error)
        try:
            _build_folder(folder, build)
        except OSError as error:
            raise ValueError(f"data_dir: cannot build the cache {folder}: {error}") from error
        return _hash_folder(folder)


def hash_json(value: object) -> str:
    """Return the SHA-256 of a JSON value, in hexadecimal.

    Args:
      value: What `json.dumps` accepts.

    Returns:
      The hash of its canonical text.

    Example:
      >>> hash_json({"a": 1, "b": 2}) == hash_json({"b": 2, "a": 1})
      True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def identify_files(files: Iterable[tuple[str, Path]]) -> str:
    """Return a hash that is another one if a file is replaced, without reading any.

    Args:
      files: Name and path of each, in order.

    Returns:
      The hash of names, sizes and times of change.

    Raises:
      OSError: A file is missing.
    """
    stats = ((name, path.stat()) for name, path in files)
    return hash_json([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, int | str]]:
    """Return what the manifest of a cache says of files.

    Args:
      folder: Where they lie.
      names: Of the files.

    Returns:
      Size and SHA-256 by name; `hash_json` of all files of a cache is what `cached_folder` returns.

    Raises:
      OSError: A file cannot be read.
    """
    return {name: _describe_file(folder / name) for name in names}


@contextlib.contextmanager
def _locked(descriptor: int) -> Iterator[None]:
    # The kernel drops the lock when its holder dies, so a lock file left behind blocks nobody.
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _build_folder(folder: Path, build: Callable[[Path], None]) -> None:
    # The lock is held: a folder of this name is what a killed process left.
    temporary = folder.parent / f".{folder.name}.building"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        build(temporary)
        manifest = describe_files(temporary, sorted(path.name for path in temporary.iterdir()))
        if folder.is_symlink():
            raise ValueError(f"the cache {folder} must be a folder, got a link; remove it")
        folder.mkdir(exist_ok=True)
        # Without its manifest a cache counts as damaged until all of it is in place. A file is
        # replaced and never written through, and files of others in the folder are let alone.
        (folder / _MANIFEST).unlink(missing_ok=True)
        for name in manifest:
            (temporary / name).replace(folder / name)
        write_durably(folder / _MANIFEST, json.dumps(manifest, indent=1))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _open_lock(path: Path) -> BinaryIO:
    def refuse_links(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, 0o666)

    return open(path, "ab", opener=refuse_links)


def _hash_folder(folder: Path) -> str:
    """Return the hash of a folder whose files are as they were written."""
    manifest = _read_manifest(folder / _MANIFEST)
    for name, expected in manifest.items():
        _check_file(folder / name, expected)
    return hash_json(manifest)


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Return size and hash by name of a file, at least one."""
    try:
        with open(path, "rb") as file:
            # One that is longer is cut, and then no JSON.
            manifest = load_json(file.read(_MOST_MANIFEST_BYTES))
    except (OSError, ValueError) as error:
        raise _DamagedError(f"{path.name}: {error}") from error
    if not (isinstance(manifest, dict) and manifest):
        raise _DamagedError(f"{path.name} names no files")
    for name, entry in manifest.items():
        if os.path.basename(name) != name or not isinstance(entry, dict):
            raise _DamagedError(f"{path.name} does not describe a file by {name[:80]!r}")
    return manifest


def _check_file(path: Path, expected: dict[str, Any]) -> None:
    try:
        # The size first: a file that is far too large would take long to read.
        intact = (
            path.is_file()
            and path.stat().st_size == expected.get("bytes")
            and _describe_file(path) == expected
        )
    except (OSError, ValueError) as error:
        raise _DamagedError(str(error)) from error
    if not intact:
        raise _DamagedError(f"{path.name} is missing, or not as it was written")


def _describe_file(path: Path) -> dict[str, int | str]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
