"""The folders and files of checkpoints: their names, their manifests, and what is wrong with them.

A manifest is one JSON object, {"crc32": ..., "content": ...}; the content lists each leaf's
dtype and shape and each file's size and checksum. Whatever else lies in the folder is left alone:
only folders are deleted that have a name of ours and a mark of a save.
"""

import dataclasses
import itertools
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsejax.strict_json import dump_json, load_json

MANIFEST = "manifest.json"
# A step saved twice gets a counted suffix: its first checkpoint stays until the second is whole.
_COMMITTED = re.compile(r"(\d{8,})(?:-([1-9]\d*))?")
_ORBAX_SUFFIX = ".orbax-checkpoint-tmp"
_UNFINISHED = re.compile(rf"{_COMMITTED.pattern}\.tmp({re.escape(_ORBAX_SUFFIX)}.*)?")
_DELETED = re.compile(rf"{_COMMITTED.pattern}\.deleted(-[1-9]\d*)?")
_ORBAX_MARK = "_CHECKPOINT_METADATA"
_MARKS = (MANIFEST, _ORBAX_MARK)
_CONTENT = {
    "step": int,
    "data_state": dict,
    "metadata": dict,
    "metrics": dict,
    "good": bool,
    "periodic": bool,
    "leaves": dict,
    "files": dict,
}


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint folder as found on disk.

    Attributes:
      step: int, optimiser steps done.
      path: Path of the folder.
      metadata: dict given to `Checkpointer.save`; empty if there is a problem.
      metrics: dict of floats given to `Checkpointer.save`; empty if there is a problem.
      good: bool given to `Checkpointer.save`; False if there is a problem.
      periodic: bool given to `Checkpointer.save`; False if there is a problem.
      problem: str that names the folder, the file and what is wrong, or None if it is whole.
    """

    step: int
    path: Path
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    good: bool = False
    periodic: bool = False
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON value, for other processes."""
        return dataclasses.asdict(self) | {"path": self.path.name}

    @classmethod
    def from_json(cls, value: dict[str, Any], directory: Path) -> "CheckpointInfo":
        """Return what `to_json` made a value of.

        Args:
          value: what it returned.
          directory: folder of checkpoints.
        """
        return cls(**value | {"path": directory / value["path"]})


def find_checkpoints(
    directory: str | os.PathLike, *, verify_checksums: bool = True
) -> list[CheckpointInfo]:
    """List the checkpoints of a folder, newest first, with what is wrong with each.

    Reads every file once to compare sizes and CRC-32 checksums with those of the save; no
    array is decoded. Saves that were interrupted are listed too, each with its problem.

    Args:
      directory: folder of checkpoints; need not exist.
      verify_checksums: bool, False compares sizes only.

    Returns:
      list of CheckpointInfo; usable are those whose `problem` is None.
    """
    found = {}
    directory = Path(directory)
    for path in directory.iterdir() if directory.is_dir() else ():
        if not path.is_dir():
            continue
        if order := parse_order(path):
            found[order] = _inspect(order[0], path, verify_checksums)
        elif match := _UNFINISHED.fullmatch(path.name):
            order = _read_order(match)
            problem = f"{path} was left unfinished by an interrupted save: it has no {MANIFEST}"
            found[order] = CheckpointInfo(order[0], path, problem=problem)
    return [found[order] for order in sorted(found, reverse=True)]


def _inspect(step: int, path: Path, verify_checksums: bool) -> CheckpointInfo:
    try:
        manifest = read_manifest(path)
        check_files(path, manifest["files"], verify_checksums=verify_checksums)
    except (ValueError, OSError) as error:
        return CheckpointInfo(step, path, problem=str(error))
    if manifest["step"] != step or isinstance(manifest["step"], bool):
        problem = f"{path / MANIFEST} is of step {manifest['step']}, not of that of its folder"
        return CheckpointInfo(step, path, problem=problem)
    return describe_checkpoint(path, manifest)


def describe_checkpoint(path: Path, manifest: dict[str, Any]) -> CheckpointInfo:
    """Describe a checkpoint that is whole.

    Args:
      path: Path of the folder.
      manifest: as `read_manifest` returns it.
    """
    names = ("step", "metadata", "metrics", "good", "periodic")
    return CheckpointInfo(path=path, **{name: manifest[name] for name in names})


def check_free_space(directory: str | os.PathLike, needed_bytes: int) -> None:
    """Refuse a folder whose disk has not room for the checkpoints.

    Args:
      directory: folder, which need not exist yet.
      needed_bytes: int; `keep_last + keep_best + 1` checkpoints exist at the peak.

    Raises:
      ValueError: if fewer bytes are free.
    """
    existing = Path(directory).absolute()
    while not existing.exists():
        existing = existing.parent
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise ValueError(
            f"directory={directory} must have room for the checkpoints: they need "
            f"{needed_bytes / 1e6:,.1f} MB, {free_bytes / 1e6:,.1f} MB are free"
        )


def choose_folder(directory: Path, step: int) -> Path:
    """Choose the name of a new checkpoint, later in order than any other of its step.

    Args:
      directory: Path of the folder of checkpoints.
      step: int, optimiser steps done.

    Returns:
      Path that does not exist yet, nor does it with ".tmp" behind it.
    """
    orders = [order for path in directory.iterdir() if (order := parse_order(path))]
    first = 1 + max((attempt for other, attempt in orders if other == step), default=-1)
    names = (f"{step:08d}-{n}" if n else f"{step:08d}" for n in itertools.count(first))
    paths = (directory / name for name in names)
    return next(path for path in paths if not os.path.lexists(get_unfinished(path)))


def get_unfinished(path: Path) -> Path:
    """Return where a checkpoint is written before it gets its name.

    Args:
      path: Path that the finished checkpoint will have.
    """
    return path.with_name(path.name + ".tmp")


def parse_order(path: Path) -> tuple[int, int] | None:
    """Read step and attempt off the name of a finished checkpoint.

    Args:
      path: Path of any file or folder.

    Returns:
      (step, attempt), which order checkpoints by age, or None for any other name.

    Example:
      >>> parse_order(Path("00000300")), parse_order(Path("00000300-2")), parse_order(Path("logs"))
      ((300, 0), (300, 2), None)
    """
    match = _COMMITTED.fullmatch(path.name)
    return _read_order(match) if match else None


def _read_order(match: re.Match[str]) -> tuple[int, int]:
    return int(match[1]), int(match[2] or 0)


def find_leftovers(directory: Path) -> list[Path]:
    """List the folders of interrupted saves and deletions.

    Args:
      directory: Path of the folder of checkpoints.
    """
    return [
        path
        for path in directory.iterdir()
        if (_UNFINISHED.fullmatch(path.name) or _DELETED.fullmatch(path.name)) and is_saved(path)
    ]


def is_saved(path: Path) -> bool:
    """Tell whether a save has made a folder, whole or not, and it may be deleted.

    Args:
      path: Path of any file, folder or link.

    Returns:
      bool, True for a folder that is marked by a save, or empty; False for a link to one.
    """
    if path.is_symlink() or not path.is_dir():
        return False
    names = {file.name for file in path.iterdir()}
    if not names or _ORBAX_SUFFIX in path.name or _ORBAX_MARK in names:
        return True
    return MANIFEST in names and _begins_like_ours(path / MANIFEST)


def _begins_like_ours(manifest: Path) -> bool:
    beginning = seal_manifest({})[:10].encode()
    with manifest.open("rb") as file:
        return file.read(len(beginning)) == beginning


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint folder, so that a kill at any moment leaves what can be recognised.

    Args:
      path: Path of the folder.
    """
    # Renamed first: a kill in mid-deletion must not leave what looks like a broken checkpoint.
    attempts = (f"{path.name}.deleted{f'-{n}' if n else ''}" for n in itertools.count())
    free = (path.with_name(name) for name in attempts)
    doomed = path.rename(next(name for name in free if not os.path.lexists(name)))
    delete_leftover(doomed)


def delete_leftover(path: Path) -> None:
    """Delete a folder that `find_leftovers` lists.

    Args:
      path: Path of the folder.
    """
    # The marks go last: without them the rest of it would not be recognised.
    for part in path.iterdir():
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part)
        elif part.name not in _MARKS:
            part.unlink()
    shutil.rmtree(path)


def seal_manifest(content: dict[str, Any]) -> str:
    """Write a manifest with its own checksum in front.

    Returns:
      str, the text of the file.
    """
    text = dump_json(content, "checkpoint")
    return f'{{"crc32": {zlib.crc32(text.encode())},\n"content": {text}}}\n'


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint folder.

    Args:
      folder: Path of the checkpoint.

    Returns:
      The content given to `seal_manifest`.

    Raises:
      ValueError: if the file is missing or any byte of it has changed.
    """
    file = folder / MANIFEST
    try:
        text = file.read_bytes()
        content = load_json(text)["content"]
        if seal_manifest(content).encode() != text:
            raise ValueError("its checksum differs")
        for name, kind in _CONTENT.items():
            if not isinstance(content.get(name), kind):
                raise ValueError(f"{name} must be of type {kind.__name__}, as in this version")
    except FileNotFoundError as error:
        raise ValueError(f"{file} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is garbled: {error}") from error
    return content


def measure_files(
    folder: Path, parts: str = "", *, known: Mapping[str, list[int]] | None = None
) -> dict[str, list[int]]:
    """Measure every file below a folder.

    Args:
      folder: Path of a checkpoint, whole or not.
      parts: str, glob of the folders in it whose files are measured; "" = all.
      known: dict of what was measured before, which is not read again.

    Returns:
      [size in bytes, CRC-32] by path relative to the folder.
    """
    measured = dict(known or {})
    for file in sorted(folder.glob(f"{parts}/**/*".lstrip("/"))):
        name = str(file.relative_to(folder))
        if name not in measured and file.is_file():
            measured[name] = [file.stat().st_size, _compute_checksum(file)]
    return dict(sorted(measured.items()))


def check_files(folder: Path, files: dict[str, list[int]], *, verify_checksums: bool) -> None:
    """Compare the files below a folder with what `measure_files` returned earlier.

    Args:
      files: [size in bytes, CRC-32] by relative path.
      verify_checksums: bool, False compares sizes only.

    Raises:
      ValueError: if a file is missing or differs, naming the first such.
    """
    for name, measured in files.items():
        file = folder / name
        if not isinstance(measured, list) or len(measured) != 2:
            raise ValueError(f"{folder / MANIFEST} must have size and checksum of {name}")
        size, checksum = measured
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        if file.stat().st_size != size:
            raise ValueError(f"{file} has {file.stat().st_size} bytes, {size} were saved")
        if verify_checksums and _compute_checksum(file) != checksum:
            raise ValueError(f"{file} has changed since it was saved: its checksum differs")


def _compute_checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
