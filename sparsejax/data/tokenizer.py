"""Tokenizers: bytes, those of the library `tokenizers`, and sources that come as ids already."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsejax.data.cache import describe_files, hash_json
from sparsejax.durable import write_durably

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"
"""Name of the file that `tokenizers` writes and reads."""

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
      separator: Id that ends each document of a language-model corpus.
      byte_lengths: Returns how many bytes of text each id stands for, i32[vocab_size], 1 for the
        separator; None where ids have no such lengths.
      whole_documents: Whether pieces of a document are joined before they are encoded.
      file: What has to be kept beside a model, None where the name says it all.
    """

    name: str
    vocab_size: int
    encode: Callable[[list], list[np.ndarray]]
    decode: Callable[[Sequence[int]], Any]
    separator: int = 0
    byte_lengths: Callable[[], np.ndarray] | None = None
    whole_documents: bool = False
    file: Path | None = None

    @property
    def dtype(self) -> np.dtype:
        """Return the smallest unsigned dtype that holds every id."""
        return np.min_scalar_type(self.vocab_size - 1)


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
        byte_lengths=lambda: np.ones(256, np.int32),
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


def make_tokenizer(
    model: "tokenizers.Tokenizer",
    *,
    name: str,
    separator: int,
    whole_documents: bool = False,
    file: Path | None = None,
) -> Tokenizer:
    """Make a tokenizer of one of the library `tokenizers`.

    What spells out a special token in a text is text: no document ends or begins amid another.
    Nothing is put before or after a document, cut off or filled up, whatever its file says of that.

    Args:
      model: Encodes and decodes; it is changed so that the above holds.
      name: As `Tokenizer.name`.
      separator: As `Tokenizer.separator`.
      whole_documents: As `Tokenizer.whole_documents`.
      file: As `Tokenizer.file`.

    Returns:
      The tokenizer; its `encode` takes UTF-8 `bytes`.
    """
    model.encode_special_tokens = True
    model.no_truncation()
    model.no_padding()
    vocab_size = count_model_ids(model)
    dtype = np.min_scalar_type(vocab_size - 1)

    def encode(documents: list[bytes]) -> list[np.ndarray]:
        texts = [decode_text(text) for text in documents]
        encodings = model.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype) for encoding in encodings]

    def measure() -> np.ndarray:
        added = model.get_added_tokens_decoder()
        lengths = np.zeros(vocab_size, np.int32)
        for token, number in model.get_vocab(with_added_tokens=True).items():
            # Of others than those added, each character stands for a byte.
            lengths[number] = len(token.encode() if number in added else token)
        lengths[separator] = 1
        return lengths

    def decode(ids: Sequence[int]) -> bytes:
        return model.decode(np.asarray(ids).tolist(), skip_special_tokens=False).encode()

    return Tokenizer(
        name=name,
        vocab_size=vocab_size,
        encode=encode,
        decode=decode,
        separator=separator,
        byte_lengths=measure if _is_byte_level(model) else None,
        whole_documents=whole_documents,
        file=file,
    )


def _is_byte_level(model: "tokenizers.Tokenizer") -> bool:
    return b'"ByteLevel"' in model.decoder.__getstate__() if model.decoder else False


def count_model_ids(model: "tokenizers.Tokenizer") -> int:
    """Return one more than the highest id; a vocabulary may leave out some below.

    Args:
      model: Of the library `tokenizers`.

    Returns:
      At least the number of its entries.
    """
    return 1 + max(model.get_vocab(with_added_tokens=True).values(), default=0)


def read_model(file: Path) -> "tokenizers.Tokenizer":
    """Read a file of the library `tokenizers`.

    Args:
      file: `tokenizer.json`, or one like it.

    Returns:
      The library's tokenizer.

    Raises:
      ValueError: The installed version of `tokenizers` cannot read it.
    """
    import tokenizers

    try:
        # Not `from_file`: it takes names of files in UTF-8 only.
        return tokenizers.Tokenizer.from_str(file.read_text("utf-8"))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(
            f"{file} must be readable by tokenizers {tokenizers.__version__}: {error}"
        ) from error


def keep_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Copy what `load_tokenizer` needs beside the name into a folder.

    Args:
      tokenizer: Of a run.
      folder: Of the run.

    Raises:
      OSError: The copy cannot be written.
    """
    if tokenizer.file is not None:
        write_durably(folder / TOKENIZER_FILE, tokenizer.file.read_bytes())


def load_tokenizer(name: str, folder: Path) -> Tokenizer:
    """Load the tokenizer of a run, wherever its data is.

    Args:
      name: Of the tokenizer.
      folder: That `keep_tokenizer` filled.

    Returns:
      The tokenizer.

    Raises:
      ValueError: No tokenizer has this name, or the folder lacks the file that belongs to it, or
        holds another.

    Example:
      >>> load_tokenizer("bytes", Path()).decode([65, 66])
      b'AB'
    """
    if name == "bytes":
        return byte_tokenizer()
    if found := re.fullmatch(r"values:([1-9][0-9]{0,9})", name):
        return value_tokenizer(int(found[1]))
    found = re.fullmatch(
        r"(?:bpe|file:(?P<separator>[0-9]{1,9})):[1-9][0-9]*:(?P<digest>[0-9a-f]{16})", name
    )
    if not found:
        raise ValueError(
            "the tokenizer of a run must be 'bytes', 'values:N', 'bpe:N:HASH' or "
            f"'file:SEPARATOR:N:HASH', got {name!r}"
        )
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        raise ValueError(f"{folder} must hold the {file.name} of tokenizer {name!r}, found none")
    try:
        digest = hash_tokenizer(file)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    if digest != found["digest"]:
        raise ValueError(f"{file} must be tokenizer {name!r}, but is another one or damaged")
    return make_tokenizer(
        read_model(file),
        name=name,
        separator=int(found["separator"] or 0),
        whole_documents=found["separator"] is not None,
        file=file,
    )


def hash_tokenizer(file: Path) -> str:
    """Return what stands for a file in the name of its tokenizer.

    Args:
      file: Of a tokenizer, by whatever name.

    Returns:
      The first digits of a hash of its contents.

    Raises:
      OSError: It cannot be read.
    """
    (contents,) = describe_files(file.parent, [file.name]).values()
    return shorten_hash(hash_json({TOKENIZER_FILE: contents}))


def shorten_hash(digest: str) -> str:
    """Return as much of a hash as the name of a tokenizer holds.

    Args:
      digest: In hexadecimal.

    Returns:
      Its beginning.
    """
    return digest[:_NUM_DIGITS]


def decode_text(text: bytes) -> str:
    """Return a document as text.

    Args:
      text: The document.

    Returns:
      Its characters.

    Raises:
      ValueError: It is not UTF-8.
    """
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"a document that begins {text[:40]!r} is not UTF-8 at byte {error.start}; expected "
            "UTF-8 for a tokenizer (tokenizer='bytes' takes anything)"
        ) from error
