"""Folders of derived files: built once, whole or absent, and checked each time they are opened."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

_LOGGER = logging.getLogger(__name__)
_MANIFEST = "manifest.json"


class _DamagedError(ValueError):
    """A cache is missing or not as it was written."""


def cached_folder(folder: Path, build: Callable[[Path], None]) -> str:
    """Make sure `folder` holds what `build` writes, and return the hash of its contents.

    The files are written to a temporary folder beside it and renamed into place with a manifest of
    sizes and SHA-256, so that a kill leaves nothing behind that could be taken for the real
    thing. A lock lets one of several processes build while the others wait.

    Args:
      folder: Where the files belong.
      build: Writes the files into the empty folder it is given. It must be deterministic.

    Returns:
      SHA-256 over the names and contents of the files, in hexadecimal.

    Raises:
      ValueError: The folder cannot be written, or what it is built from cannot be read.
    """
    with contextlib.suppress(_DamagedError):
        return _hash_folder(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.parent / f".{folder.name}.lock", "wb")  # noqa: SIM115
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
        manifest = {
            path.relative_to(temporary).as_posix(): _describe_file(path)
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _describe_file(path: Path) -> dict[str, int | str]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _hash_folder(folder: Path) -> str:
    """Return the hash of a folder whose files are as they were written."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        found = {name: _describe_file(folder / name) for name in manifest}
    except (OSError, json.JSONDecodeError) as error:
        raise _DamagedError(str(error)) from error
    for name, expected in manifest.items():
        if found[name] != expected:
            raise _DamagedError(f"{name} is {found[name]}, written was {expected}")
    return hash_json(manifest)
