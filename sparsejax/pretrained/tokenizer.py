"""Tokenizers that pretrained models were trained with, from tokenizer.json and from GGUF files."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsejax.data import Tokenizer

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"
"""Name of the file that the library `tokenizers` writes and reads."""

# Of GGUF's types of tokens.
_CONTROL, _USER_DEFINED = 3, 4
# How texts are split before their bytes are merged, by the names of GGUF.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = ("gpt-2", "llama-bpe", "smollm")


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """Read the tokenizer.json of a folder.

    Returns:
      Tokenizer, None if the folder has none.

    Raises:
      ValueError: if the file cannot be read.
    """
    import tokenizers

    file = folder / TOKENIZER_FILE
    if not file.is_file():
        return None
    try:
        # Not `from_file`: it takes names of files in UTF-8 only.
        model = tokenizers.Tokenizer.from_str(file.read_text("utf-8"))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(
            f"{file} must be readable by tokenizers {tokenizers.__version__}: {error}"
        ) from error
    return make_tokenizer(model, name=f"file:{file}", file=file)


def make_gguf_model(metadata: dict[str, Any], origin: str) -> "tokenizers.Tokenizer":
    """Make the tokenizer that the metadata of a GGUF file describe: byte-level BPE.

    Args:
      metadata: keys and values.
      origin: the file, for messages.

    Raises:
      ValueError: if it is of another kind.
    """
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers

    kind, split = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind != "gpt2":
        raise ValueError(f"{origin}: tokenizer.ggml.model must be 'gpt2', got {kind!r}")
    if split not in _SPLITS:
        raise ValueError(f"{origin}: tokenizer.ggml.pre must be one of {_SPLITS}, got {split!r}")
    tokens, types = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        raise ValueError(f"{origin}: tokenizer.ggml.tokens must differ, found some twice")
    # A token that is a word of its own is not put together from others.
    whole = split == "llama-bpe"
    model = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=whole))
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not whole)
    first = {
        "smollm": lambda: [pre_tokenizers.Digits(individual_digits=True)],
        "llama-bpe": lambda: [
            pre_tokenizers.Split(tokenizers.Regex(_LLAMA3_SPLIT), behavior="isolated")
        ],
        "gpt-2": list,
    }[split]()
    model.pre_tokenizer = pre_tokenizers.Sequence([*first, pieces])
    model.decoder = decoders.ByteLevel()
    for token, of_type in zip(tokens, types, strict=True):
        if of_type in (_CONTROL, _USER_DEFINED):
            special = of_type == _CONTROL
            added = AddedToken(token, special=special, normalized=False)
            (model.add_special_tokens if special else model.add_tokens)([added])
    return model


def make_tokenizer(
    model: "tokenizers.Tokenizer", *, name: str, file: Path | None = None
) -> Tokenizer:
    """Make a Tokenizer of one of the library `tokenizers`.

    What spells out a special token in a text is text, and none is put around a document.

    Args:
      name: as `Tokenizer.name`.
      file: as `Tokenizer.file`.
    """
    model.encode_special_tokens = True
    model.no_truncation()
    model.no_padding()
    vocab_size = 1 + max(model.get_vocab(with_added_tokens=True).values(), default=0)
    dtype = np.min_scalar_type(vocab_size - 1)

    def encode(documents: list[bytes]) -> list[np.ndarray]:
        texts = [text.decode() for text in documents]
        encodings = model.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype) for encoding in encodings]

    def decode(ids: Sequence[int]) -> bytes:
        return model.decode(np.asarray(ids).tolist(), skip_special_tokens=False).encode()

    return Tokenizer(name=name, vocab_size=vocab_size, encode=encode, decode=decode, file=file)
