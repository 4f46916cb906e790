"""Language-model corpora from a text file or a folder of them."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from sparsejax.data.cache import hash_json
from sparsejax.data.config import DataConfig
from sparsejax.data.source import Contents, Example, Options, Source, Split

OPTIONS = Options({"tokenizer", "validation_fraction", "mask_fraction"})

type Utf8 = Literal["required", "skip", "any"]

_PIECE_BYTES = 256 << 10


def describe_text(config: DataConfig) -> Contents:
    """Describe a corpus, whatever its files hold.

    Args:
      config: Settings of a corpus.

    Returns:
      Its contents.
    """
    return Contents("language_model")


def open_text(config: DataConfig) -> Source:
    """Open a text file, or every file below a folder, as a corpus.

    A folder is split by the hash of each file's relative path; hidden files are left out. A single
    file is split by position: its tail is held out, cut at the start of a line. For a BPE tokenizer
    every file must be UTF-8.

    Args:
      config: Settings with `source="text:/path"`.

    Returns:
      The corpus.

    Raises:
      ValueError: The path is missing, unreadable, empty, too small to split, or not UTF-8.
    """
    path = Path(config.rest)
    utf8 = "any" if config.tokenizer == "bytes" else "required"
    if path.is_file():
        return _open_file(config, path, utf8)
    if not path.is_dir():
        raise ValueError(f"source='text:{path}': no such file or folder")
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and not any(p.startswith(".") for p in file.relative_to(path).parts)
    ]
    return open_folder(config, path, files, utf8=utf8)


def open_folder(config: DataConfig, root: Path, files: list[Path], *, utf8: Utf8) -> Source:
    """Open files of one folder as a corpus, split by the hash of their paths.

    Args:
      config: Settings of the corpus.
      root: The folder.
      files: Files below it, in the order of the corpus.
      utf8: What becomes of a file that is not UTF-8.

    Returns:
      The corpus.

    Raises:
      ValueError: A split has no text.
    """
    fraction = config.validation_fraction
    names = {file: file.relative_to(root).as_posix() for file in files}
    splits = {
        "validation": [f for f in files if _hash_fraction(names[f]) < fraction],
        "train": [f for f in files if _hash_fraction(names[f]) >= fraction],
    }
    for split, members in splits.items():
        if not any(file.stat().st_size for file in members):
            raise ValueError(
                f"source='text:{root}': the {split} split has no text; {len(files)} files were "
                f"found and validation_fraction={fraction} of them, chosen by the hash "
                "of their names, are held out; expected text on both sides (a single file is "
                "split by position instead)"
            )

    def read(split: Split) -> Iterator[Example]:
        for file in splits[split]:
            if utf8 != "skip" or _is_utf8(file):
                yield from _read_span(file, 0, file.stat().st_size, utf8)

    return Source(
        contents=describe_text(config),
        identity={"files": _describe_files(names.items()), "fraction": fraction},
        read=read,
    )


def _open_file(config: DataConfig, path: Path, utf8: Utf8) -> Source:
    size, fraction = path.stat().st_size, config.validation_fraction
    cut = _find_cut(path, int(size * (1 - fraction)))
    if not 0 < cut < size:
        raise ValueError(
            f"source='text:{path}': the file has {size} bytes; expected enough text to hold out "
            f"validation_fraction={fraction} of it"
        )
    spans = {"train": (0, cut), "validation": (cut, size)}
    return Source(
        contents=describe_text(config),
        identity={"files": _describe_files([(path, path.name)]), "cut": cut},
        read=lambda split: _read_span(path, *spans[split], utf8),
    )


def _find_cut(path: Path, position: int) -> int:
    """Return the first start of a line, or of a character if no line follows, from a position."""
    with _open_bytes(path) as file:
        file.seek(position)
        if file.readline().endswith(b"\n") and file.read(1):
            return file.tell() - 1
        file.seek(position)
        continuation = 0
        while (byte := file.read(1)) and 0x80 <= byte[0] < 0xC0:
            continuation += 1
    return position + continuation


def _read_span(path: Path, start: int, stop: int, utf8: Utf8) -> Iterator[Example]:
    with _open_bytes(path) as file:
        file.seek(start)
        while (left := stop - file.tell()) > 0:
            piece = file.read(min(left, _PIECE_BYTES))
            piece += file.readline(stop - file.tell()) if file.tell() < stop else b""
            if utf8 == "required":
                _check_utf8(piece, path, file.tell() - len(piece))
            yield Example((piece,), complete=file.tell() >= stop)


def _open_bytes(path: Path):
    try:
        return open(path, "rb")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error


def _check_utf8(piece: bytes, path: Path, start: int) -> None:
    try:
        piece.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text at byte {start + error.start}; expected UTF-8 for a BPE "
            "tokenizer (tokenizer='bytes' takes anything)"
        ) from error


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True


def _describe_files(names: Iterable[tuple[Path, str]]) -> str:
    stats = ((name, path.stat()) for path, name in names)
    return hash_json([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def _hash_fraction(name: str) -> float:
    """Return a number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
