"""Language-model corpora from a text file or a folder of them."""

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from sparsejax.data.cache import identify_files
from sparsejax.data.config import DataConfig
from sparsejax.data.files import hash_name, list_files
from sparsejax.data.source import Contents, Example, Options, Source, Split

OPTIONS = Options({"tokenizer", "validation_fraction", "mask_fraction"})

type NotText = Literal["refuse", "skip"]

# A document is read in pieces of whole lines, but a line longer than this is cut.
_PIECE_BYTES, _LONGEST_LINE_BYTES = 256 << 10, 1 << 20
_CONTINUATION_BYTES = bytes(range(0x80, 0xC0))


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
    file is split by position: its tail is held out, cut at the start of a line. Every file must be
    text: UTF-8 without the byte 0. A byte-order mark at its beginning is dropped.

    Args:
      config: Settings with `source="text:/path"`.

    Returns:
      The corpus.

    Raises:
      ValueError: The path is missing, unreadable, empty, too small to split, or not text; the
        last is found when the file is read.
    """
    path = Path(config.rest)
    if path.is_file():
        return _open_file(config, path)
    if not path.is_dir():
        raise ValueError(f"source={config.source!r}: no such file or folder")
    return open_folder(config, path, list_files(path), not_text="refuse")


def open_folder(config: DataConfig, root: Path, files: list[Path], *, not_text: NotText) -> Source:
    """Open files of one folder as a corpus, split by the hash of their paths.

    Args:
      config: Settings of the corpus.
      root: The folder.
      files: Files below it, in the order of the corpus.
      not_text: What becomes of a file that is not UTF-8, or holds the byte 0.

    Returns:
      The corpus.

    Raises:
      ValueError: A split has no text.
    """
    fraction = config.validation_fraction
    names = {file: file.relative_to(root).as_posix() for file in files}
    splits = {
        "validation": [f for f in files if hash_name(names[f]) < fraction],
        "train": [f for f in files if hash_name(names[f]) >= fraction],
    }
    for split, members in splits.items():
        if not any(file.stat().st_size for file in members):
            raise ValueError(
                f"source={config.source!r}: the {split} split has no text; {len(files)} files were "
                f"found and validation_fraction={fraction} of them, chosen by the hash "
                "of their names, are held out; expected text on both sides (a single file is "
                "split by position instead)"
            )

    def read(split: Split) -> Iterator[Example]:
        for file in splits[split]:
            if not_text == "refuse" or _is_text(file):
                yield from _read_span(file, 0, file.stat().st_size)

    return Source(
        contents=describe_text(config),
        identity={
            "files": identify_files((name, file) for file, name in names.items()),
            "fraction": fraction,
        },
        read=read,
    )


def _open_file(config: DataConfig, path: Path) -> Source:
    size, fraction = path.stat().st_size, config.validation_fraction
    cut = _find_cut(path, int(size * (1 - fraction)))
    if not 0 < cut < size:
        raise ValueError(
            f"source={config.source!r}: the file has {size} bytes; expected enough text to hold "
            f"out validation_fraction={fraction} of it"
        )
    spans = {"train": (0, cut), "validation": (cut, size)}
    return Source(
        contents=describe_text(config),
        identity={"files": identify_files([(path.name, path)]), "cut": cut},
        read=lambda split: _read_span(path, *spans[split]),
    )


def _find_cut(path: Path, position: int) -> int:
    """Return the first start of a line, or of a character if none is near, from a position."""
    with _open_bytes(path) as file:
        file.seek(position)
        if file.readline(_LONGEST_LINE_BYTES).endswith(b"\n") and file.read(1):
            return file.tell() - 1
        file.seek(position)
        following = file.read(3)
    return position + len(following) - len(following.lstrip(_CONTINUATION_BYTES))


def _read_span(path: Path, start: int, stop: int) -> Iterator[Example]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _open_bytes(path) as file:
        file.seek(start)
        if start == 0 and file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        while (left := stop - file.tell()) > 0:
            piece = file.read(min(left, _PIECE_BYTES))
            if not piece:
                raise ValueError(f"{str(path)!r} has shrunk; expected {stop} bytes, as at first")
            piece += file.readline(min(stop - file.tell(), _LONGEST_LINE_BYTES))
            complete = file.tell() >= stop
            text = _decode(decoder, piece, path, file.tell(), final=complete)
            yield Example((text.encode(),), complete=complete)


def _decode(
    decoder: codecs.IncrementalDecoder, piece: bytes, path: Path, stop: int, *, final: bool
) -> str:
    """Return the text of a piece that ends at a position; a character may end in the next one."""
    if (zero := piece.find(0)) >= 0:
        raise _refuse(path, "byte 0", stop - len(piece) + zero)
    try:
        return decoder.decode(piece, final)
    except UnicodeDecodeError as error:
        # What is decoded begins with what the last piece has left.
        raise _refuse(path, "no character", stop - len(error.object) + error.start) from error


def _refuse(path: Path, found: str, position: int) -> ValueError:
    return ValueError(
        f"{str(path)!r} is not text: {found} at position {position}; expected UTF-8 without the "
        "byte 0 (iconv makes it of UTF-16 and other encodings)"
    )


def _open_bytes(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r}: {error.strerror}") from error


def _is_text(path: Path) -> bool:
    try:
        return "\0" not in path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
