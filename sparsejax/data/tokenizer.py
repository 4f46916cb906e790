"""Tokenizers: bytes, byte-level BPE trained on the spot, and sources that come as ids already."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsejax.data.cache import describe_files, hash_json
from sparsejax.durable import write_durably

SEPARATOR = 0
"""Id that ends each document of a language-model corpus."""

_SEPARATOR_TOKEN = "<|endoftext|>"
_FILE = "tokenizer.json"
# Of a hash, in the name of a tokenizer.
_NUM_DIGITS = 16


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Turn documents into ids.

    Attributes:
      name: Identifies the tokenizer; equal names encode equally.
      vocab_size: Ids are in [0, vocab_size).
      encode: Maps a list of documents to one integer array each.
      decode: Maps ids back to a document; bytes of a text.
      file: What has to be kept beside a model, None where the name says it all.
    """

    name: str
    vocab_size: int
    encode: Callable[[list], list[np.ndarray]]
    decode: Callable[[Sequence[int]], Any]
    file: Path | None = None

    @property
    def dtype(self) -> np.dtype:
        """Return the smallest unsigned dtype that holds every id."""
        return np.min_scalar_type(self.vocab_size - 1)


def count_ids(tokenizer: str) -> int:
    """Return how many ids a tokenizer of text has.

    Args:
      tokenizer: As in `DataConfig`.

    Returns:
      The number of ids, the separator included.

    Example:
      >>> count_ids("bytes"), count_ids("bpe:4096")
      (256, 4096)
    """
    return 256 if tokenizer == "bytes" else int(tokenizer.partition(":")[2])


def byte_tokenizer() -> Tokenizer:
    """Make the tokenizer whose ids are the bytes themselves.

    The separator of a language-model corpus is the byte 0, which text does not use.

    Returns:
      A tokenizer of 256 ids.

    Example:
      >>> byte_tokenizer().encode([b"AB"])[0].tolist()
      [65, 66]
    """
    return Tokenizer(
        name="bytes",
        vocab_size=256,
        encode=lambda documents: [np.frombuffer(text, np.uint8) for text in documents],
        decode=lambda ids: np.asarray(ids, np.uint8).tobytes(),
    )


def value_tokenizer(num_values: int) -> Tokenizer:
    """Make the tokenizer of documents that are arrays of ids already.

    Args:
      num_values: Ids are in [0, num_values).

    Returns:
      The identity on such arrays.
    """
    return Tokenizer(
        name=f"values:{num_values}",
        vocab_size=num_values,
        encode=lambda documents: documents,
        decode=np.asarray,
    )


def train_bpe(folder: Path, texts: Iterable[bytes], vocab_size: int) -> None:
    """Train byte-level BPE and save it.

    Id 0 is the separator; the 256 bytes and the merges follow, so every text has an encoding and
    decodes to itself.

    Args:
      folder: Where `tokenizer.json` is written.
      texts: UTF-8 texts of the training split.
      vocab_size: Number of entries, the separator included.

    Raises:
      ValueError: The texts are too few to learn that many entries, or not UTF-8.
      OSError: The file cannot be written.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_SEPARATOR_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(map(_decode, texts), trainer)
    if bpe.get_vocab_size() != vocab_size:
        raise ValueError(
            f"tokenizer='bpe:{vocab_size}': the training split yields only "
            f"{bpe.get_vocab_size()} entries; expected at most that many"
        )
    write_durably(folder / _FILE, bpe.to_str(pretty=True))


def load_bpe(folder: Path, name: str) -> Tokenizer:
    """Load what `train_bpe` saved.

    Args:
      folder: Where `tokenizer.json` lies.
      name: Name of the tokenizer.

    Returns:
      The tokenizer; its `encode` takes UTF-8 `bytes`.

    Raises:
      ValueError: The installed version of `tokenizers` cannot read it.
    """
    import tokenizers

    try:
        # Not `from_file`: it takes names of files in UTF-8 only.
        bpe = tokenizers.Tokenizer.from_str((folder / _FILE).read_text("utf-8"))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(
            f"{folder / _FILE} must be readable by tokenizers {tokenizers.__version__}: {error}"
        ) from error
    # A text that spells out the separator's name must not become the separator.
    bpe.encode_special_tokens = True

    def encode(documents: list[bytes]) -> list[np.ndarray]:
        encodings = bpe.encode_batch_fast([_decode(text) for text in documents])
        return [np.asarray(encoding.ids, np.uint16) for encoding in encodings]

    def decode(ids: Sequence[int]) -> bytes:
        return bpe.decode(np.asarray(ids).tolist(), skip_special_tokens=False).encode()

    return Tokenizer(
        name=name,
        vocab_size=bpe.get_vocab_size(),
        encode=encode,
        decode=decode,
        file=folder / _FILE,
    )


def keep_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Copy what `load_tokenizer` needs beside the name into a folder.

    Args:
      tokenizer: Of a run.
      folder: Of the run.

    Raises:
      OSError: The copy cannot be written.
    """
    if tokenizer.file is not None:
        write_durably(folder / _FILE, tokenizer.file.read_bytes())


def load_tokenizer(name: str, folder: Path) -> Tokenizer:
    """Load the tokenizer of a run, wherever its data is.

    Args:
      name: Of the tokenizer.
      folder: That `keep_tokenizer` filled.

    Returns:
      The tokenizer.

    Raises:
      ValueError: No tokenizer has this name, or the folder lacks the file of a BPE tokenizer, or
        holds another.

    Example:
      >>> load_tokenizer("bytes", Path()).decode([65, 66])
      b'AB'
    """
    if name == "bytes":
        return byte_tokenizer()
    if found := re.fullmatch(r"values:([1-9][0-9]{0,8})", name):
        return value_tokenizer(int(found[1]))
    found = re.fullmatch(r"bpe:[1-9][0-9]*:([0-9a-f]{16})", name)
    if not found:
        raise ValueError(
            f"the tokenizer of a run must be 'bytes', 'values:N' or 'bpe:N:HASH', got {name!r}"
        )
    file = folder / _FILE
    if not file.is_file():
        raise ValueError(f"{folder} must hold the {_FILE} of tokenizer {name!r}, found none")
    if hash_json(describe_files(folder, [_FILE]))[:_NUM_DIGITS] != found[1]:
        raise ValueError(f"{file} must be tokenizer {name!r}, but is another one or damaged")
    return load_bpe(folder, name)


def name_bpe(tokenizer: str, digest: str) -> str:
    """Name a trained tokenizer by its file, so that equal names encode equally.

    Args:
      tokenizer: As in `DataConfig`.
      digest: What `cached_folder` returned for the folder that `train_bpe` filled.

    Returns:
      A name that `load_tokenizer` takes.
    """
    return f"{tokenizer}:{digest[:_NUM_DIGITS]}"


def _decode(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"a document that begins {text[:40]!r} is not UTF-8 at byte {error.start}; expected "
            "UTF-8 for a BPE tokenizer (tokenizer='bytes' takes anything)"
        ) from error
