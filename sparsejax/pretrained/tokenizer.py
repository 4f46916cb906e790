"""Tokenizers out of the metadata of GGUF files."""

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsejax.data import Tokenizer
from sparsejax.data.tokenizer import TOKENIZER_FILE
from sparsejax.data.tokenizer_files import CONFIG_FILE, open_tokenizer_file

if TYPE_CHECKING:
    import tokenizers

# Of GGUF's types of tokens.
_CONTROL, _USER_DEFINED = 3, 4
# How texts are split before their bytes are merged, by the names of GGUF.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END = "tokenizer.ggml.eos_token_id"
_LISTS = ("tokens", "token_type", "merges")
_SPLITS = ("gpt-2", "llama-bpe", "smollm")


def open_gguf_tokenizer(metadata: Mapping[str, Any], origin: str) -> Tokenizer | None:
    """Make the tokenizer of a GGUF file, with the name that its tokenizer.json has.

    Args:
      metadata: keys and values.
      origin: the file, for messages.

    Returns:
      Tokenizer without a file of its own, None if the file has none.

    Raises:
      ValueError: if it is of an unknown kind.
    """
    if "tokenizer.ggml.model" not in metadata:
        return None
    with tempfile.TemporaryDirectory() as folder:
        for name, text in write_gguf_tokenizer(metadata, origin).items():
            (Path(folder) / name).write_text(text, "utf-8")
        return dataclasses.replace(open_tokenizer_file(f"file:{folder}"), file=None)


def write_gguf_tokenizer(metadata: Mapping[str, Any], origin: str) -> dict[str, str]:
    """Return the tokenizer.json of a GGUF file, and a config that names the token that ends a text.

    Args:
      metadata: keys and values.
      origin: the file, for messages.

    Returns:
      Name of a file -> what stands in it; without a config where the GGUF file names no such token.

    Raises:
      ValueError: if the tokenizer is of an unknown kind, or ends texts with a token that it lacks.
    """
    files = {TOKENIZER_FILE: _make_model(metadata, origin).to_str(pretty=True)}
    end = metadata.get(_END)
    if end is not None:
        tokens = _get_list(metadata, "tokenizer.ggml.tokens", origin)
        if type(end) is not int or not 0 <= end < len(tokens):
            raise ValueError(f"{origin}: {_END} must be an id below {len(tokens)}, got {end!r}")
        files[CONFIG_FILE] = json.dumps({"eos_token": tokens[end]})
    return files


def _make_model(metadata: Mapping[str, Any], origin: str) -> "tokenizers.Tokenizer":
    """Make what the metadata describe: byte-level BPE."""
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers

    kind, split = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind != "gpt2":
        raise ValueError(f"{origin}: tokenizer.ggml.model must be 'gpt2', got {kind!r}")
    if split not in _SPLITS:
        raise ValueError(f"{origin}: tokenizer.ggml.pre must be one of {_SPLITS}, got {split!r}")
    tokens, types, pairs = (_get_list(metadata, f"tokenizer.ggml.{key}", origin) for key in _LISTS)
    merges = [tuple(pair.split(" ")) for pair in pairs]
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


def _get_list(metadata: Mapping[str, Any], key: str, origin: str) -> list[Any]:
    value = metadata.get(key)
    if not isinstance(value, list):
        raise ValueError(f"{origin}: {key} must be a list, got {value!r:.40}")
    return value
