"""The folders and files of checkpoints: their names, their manifests, and what is wrong with them.

A manifest is one JSON object, {"crc32": ..., "content": ...}; the content lists each leaf's
dtype and shape and each file's size and checksum.
"""

import dataclasses
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
_COMMITTED = re.compile(r"(\d+)(?:-(\d+))?")
_UNFINISHED = re.compile(r"(\d+)(?:-(\d+))?\.tmp.*")
_DELETED_SUFFIX = ".deleted"


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint folder as found on disk.

    Attributes:
      step: int, optimiser steps done.
      path: Path of the folder.
      metadata: dict given to `Checkpointer.save`; empty if there is a problem.
      metrics: dict of floats given to `Checkpointer.save`; empty if there is a problem.
      problem: str that names the folder, the file and what is wrong, or None if it is whole.
    """

    step: int
    path: Path
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    problem: str | None = None


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
    except ValueError as error:
        return CheckpointInfo(step, path, problem=str(error))
    return CheckpointInfo(step, path, manifest["metadata"], manifest["metrics"])


def choose_folder(directory: Path, step: int) -> Path:
    """Choose the name of a new checkpoint, later in order than any other of its step.

    Args:
      directory: Path of the folder of checkpoints.
      step: int, optimiser steps done.

    Returns:
      Path that does not exist yet.
    """
    orders = [order for path in directory.iterdir() if (order := parse_order(path))]
    attempt = 1 + max((attempt for other, attempt in orders if other == step), default=-1)
    return directory / (f"{step:08d}-{attempt}" if attempt else f"{step:08d}")


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
        if _UNFINISHED.fullmatch(path.name) or path.name.endswith(_DELETED_SUFFIX)
    ]


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint folder.

    Args:
      path: Path of the folder.
    """
    # Renamed first: a kill in mid-deletion must not leave what looks like a broken checkpoint.
    doomed = path.rename(path.with_name(path.name + _DELETED_SUFFIX))
    shutil.rmtree(doomed)


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
    except FileNotFoundError as error:
        raise ValueError(f"{file} is missing") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is garbled: {error}") from error
    return content


def describe_leaves(leaves: Mapping[str, Any]) -> dict[str, str]:
    """Describe each leaf by its dtype and shape.

    Args:
      leaves: arrays, jax.ShapeDtypeStruct or None by name.

    Returns:
      dict of str by name, such as "float32[2, 3]" or "None".
    """
    return {
        name: "None" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"
        for name, leaf in leaves.items()
    }


def measure_files(folder: Path) -> dict[str, list[int]]:
    """Measure every file below a folder.

    Returns:
      [size in bytes, CRC-32] by path relative to the folder.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(file.relative_to(folder)): [file.stat().st_size, _compute_checksum(file)]
        for file in files
    }


def check_files(folder: Path, files: dict[str, list[int]], *, verify_checksums: bool) -> None:
    """Compare the files below a folder with what `measure_files` returned earlier.

    Args:
      files: [size in bytes, CRC-32] by relative path.
      verify_checksums: bool, False compares sizes only.

    Raises:
      ValueError: if a file is missing or differs, naming the first such.
    """
    for name, (size, checksum) in files.items():
        file = folder / name
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
