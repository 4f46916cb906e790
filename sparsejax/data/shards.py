"""Files of token ids as other trainers write them, mapped where they are.

A file is either the ids alone, uint16 as nanoGPT writes them, or begins with the header of llm.c
and modded-nanogpt: 256 numbers of int32, of which the first says what follows, the second the
version and the third how many ids there are.

Numbers are little-endian.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparsejax.data.progress import show_progress
from sparsejax.durable import write_durably

_INDEX = "shards.json"
_HEADER = np.dtype("<i4")
_HEADER_BYTES = 256 * _HEADER.itemsize
_RAW = np.dtype("<u2")
# First number of a header -> version, type of the ids.
_FORMATS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
# First numbers are dates. As ids, these would be those of a vocabulary above 54,912.
_DATES = range(20_240_000, 20_250_000)
_BLOCK_IDS = 1 << 22


class Shard(NamedTuple):
    """A run of ids within a file.

    Attributes:
      path: The file.
      dtype: Of an id.
      header_bytes: What comes before the ids of the file.
      num_ids: How many ids there are.
      first: Position in the file of the first one.
    """

    path: Path
    dtype: np.dtype
    header_bytes: int
    num_ids: int
    first: int = 0

    @property
    def start_bytes(self) -> int:
        """Return where in the file the first id lies."""
        return self.header_bytes + self.first * self.dtype.itemsize

    def map(self) -> np.ndarray:
        """Map the ids.

        Returns:
          unsigned[num_ids].
        """
        return np.memmap(self.path, self.dtype, "r", self.start_bytes, (self.num_ids,))

    def split(self, position: int) -> "tuple[Shard, Shard]":
        """Cut in two.

        Args:
          position: Ids before the cut.

        Returns:
          What is before and after it.
        """
        after = self._replace(first=self.first + position, num_ids=self.num_ids - position)
        return self._replace(num_ids=position), after


def read_shard(path: Path) -> Shard:
    """Read how a file holds its ids.

    Args:
      path: The file.

    Returns:
      All of its ids.

    Raises:
      ValueError: It is empty, cut off, or of another format.
      OSError: It cannot be read.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(3 * _HEADER.itemsize)
    if len(header) == 3 * _HEADER.itemsize:
        magic, version, num_ids = np.frombuffer(header, _HEADER).tolist()
        if magic in _DATES:
            return _understand_header(path, size, magic, version, num_ids)
    if not size or size % _RAW.itemsize:
        raise ValueError(f"{path} has {size} bytes; expected ids of {_RAW.itemsize} bytes each")
    return Shard(path, _RAW, 0, size // _RAW.itemsize)


def _understand_header(path: Path, size: int, magic: int, version: int, num_ids: int) -> Shard:
    known, dtype = _FORMATS.get(magic, (None, _RAW))
    if version != known:
        formats = ", ".join(f"{magic} version {known}" for magic, (known, _) in _FORMATS.items())
        raise ValueError(
            f"{path} has a header of format {magic} version {version}; expected ids, which are "
            f"{formats}"
        )
    expected = _HEADER_BYTES + num_ids * dtype.itemsize
    if size != expected or num_ids < 1:
        raise ValueError(
            f"{path} announces {num_ids} ids and has {size} bytes; expected {expected} for at "
            "least one"
        )
    return Shard(path, dtype, _HEADER_BYTES, num_ids)


def cut_shards(shards: Sequence[Shard], position: int) -> tuple[list[Shard], list[Shard]]:
    """Cut a stream in two.

    Args:
      shards: The stream.
      position: Ids before the cut.

    Returns:
      What is before and after it.
    """
    before, after = [], []
    for shard in shards:
        parts = shard.split(min(position, shard.num_ids))
        position -= parts[0].num_ids
        for side, part in zip((before, after), parts, strict=True):
            side += [part] if part.num_ids else []
    return before, after


def write_index(folder: Path, shards: Sequence[Shard], vocab_size: int) -> None:
    """Read shards once, and write down what they are.

    Args:
      folder: Existing folder for the file.
      shards: A split.
      vocab_size: Ids are in [0, vocab_size).

    Raises:
      ValueError: A file holds an id that is too large, or has shrunk.
    """
    found = [
        {"ids": shard.num_ids, "type": shard.dtype.str, "sha256": _hash_ids(shard, vocab_size)}
        for shard in show_progress(shards, "Checking ids", len(shards))
    ]
    write_durably(folder / _INDEX, json.dumps(found, indent=1))


class ShardStream:
    """The ids of shards, one after the other, of which memory holds what is read alone."""

    def __init__(self, shards: Sequence[Shard]):
        """Map the shards.

        Args:
          shards: In the order of the stream.
        """
        self._ids = [shard.map() for shard in shards]
        self._starts = np.cumsum([0, *(shard.num_ids for shard in shards)])

    @property
    def size(self) -> int:
        """Return the number of ids."""
        return int(self._starts[-1])

    def __getitem__(self, span: slice) -> np.ndarray:
        start, stop, _ = span.indices(self.size)
        first = int(np.searchsorted(self._starts, start, "right")) - 1
        parts = []
        while start < stop:
            offset = int(self._starts[first])
            part = self._ids[first][start - offset : stop - offset]
            parts.append(part)
            start += part.size
            first += 1
        # Files of one stream may hold ids of two types.
        return np.concatenate(parts) if parts else np.empty(0, _RAW)


def _hash_ids(shard: Shard, vocab_size: int) -> str:
    digest, position = hashlib.sha256(), shard.first
    for ids in _read_blocks(shard):
        if ids.max() >= vocab_size:
            place = int(np.argmax(ids >= vocab_size))
            raise ValueError(
                f"{shard.path} holds the id {ids[place]} at position {position + place}; expected "
                f"ids in [0, {vocab_size})"
            )
        digest.update(ids.data)
        position += ids.size
    return digest.hexdigest()


def _read_blocks(shard: Shard) -> Iterator[np.ndarray]:
    # Not mapped: pages that were read once must not count as the memory of this process.
    with open(shard.path, "rb") as file:
        file.seek(shard.start_bytes)
        left = shard.num_ids
        while left:
            ids = np.fromfile(file, shard.dtype, min(left, _BLOCK_IDS))
            if not ids.size:
                raise ValueError(f"{shard.path} has shrunk; expected {shard.num_ids} ids")
            left -= ids.size
            yield ids
