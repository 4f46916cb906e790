"""Tokenizers that exist already: `tokenizer.json`, as models on the Hugging Face hub have it."""

import functools
import os
from pathlib import Path
from typing import Any

from sparsejax.data.cache import identify_files
from sparsejax.data.tokenizer import (
    TOKENIZER_FILE,
    Tokenizer,
    count_model_ids,
    hash_tokenizer,
    make_tokenizer,
    read_model,
)
from sparsejax.strict_json import load_json

CONFIG_FILE = "tokenizer_config.json"
# BERT and its kin have no token that ends a text, but one that parts two.
_SEPARATORS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "[SEP]")


def open_tokenizer_file(tokenizer: str) -> Tokenizer:
    """Open an existing tokenizer, whose text is encoded as the library does it.

    The separator of a corpus is the `eos_token` of `tokenizer_config.json` beside the file, or else
    the first that it has of `<|endoftext|>`, `</s>`, `<|end_of_text|>` and `[SEP]`. Documents are
    encoded whole; one of more than 262,144 characters in parts (`sparsejax.data.pieces`).

    Args:
      tokenizer: `"file:/path"` of a `tokenizer.json`, by whatever name, or of a folder with one.

    Returns:
      The tokenizer; its name holds its separator, its size and a hash of the file.

    Raises:
      ValueError: There is no such file, it cannot be read, or has no separator.
    """
    file = _find_file(tokenizer)
    beside = file.with_name(CONFIG_FILE)
    read = [(path.name, path) for path in (file, beside) if path.is_file()]
    try:
        return _open(tokenizer, file, identify_files(read))
    except OSError as error:
        raise ValueError(f"tokenizer={tokenizer!r} cannot be read: {error.strerror}") from error


# Large ones take a second, and a run asks three times.
@functools.lru_cache(maxsize=1)
def _open(tokenizer: str, file: Path, _identity: str) -> Tokenizer:
    digest = hash_tokenizer(file)
    model = read_model(file)
    separator = _find_separator(tokenizer, model, file.with_name(CONFIG_FILE))
    return make_tokenizer(
        model,
        name=f"file:{separator}:{count_model_ids(model)}:{digest}",
        separator=separator,
        whole_documents=True,
        file=file,
    )


def _find_file(tokenizer: str) -> Path:
    path = Path(os.path.expanduser(tokenizer.partition(":")[2]))
    try:
        file = path / TOKENIZER_FILE if path.is_dir() else path
        found = file.is_file()
    except OSError as error:
        raise ValueError(f"tokenizer={tokenizer!r} cannot be read: {error.strerror}") from error
    if not found:
        raise ValueError(
            f"tokenizer={tokenizer!r}: {file} is no file; expected a {TOKENIZER_FILE}, or a folder "
            "that holds one"
        )
    return file


def _find_separator(tokenizer: str, model: Any, config_file: Path) -> int:
    named = _read_eos_token(config_file) if config_file.is_file() else None
    wanted = _SEPARATORS if named is None else (named,)
    ids = [model.token_to_id(token) for token in wanted]
    separator = next((found for found in ids if found is not None), None)
    if separator is None:
        raise ValueError(
            f"tokenizer={tokenizer!r} has no token that ends a text: looked for "
            f"{', '.join(map(repr, wanted))}; expected one, or its name as eos_token in "
            f"{config_file.name} beside it"
        )
    return separator


def _read_eos_token(file: Path) -> str | None:
    try:
        config = load_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}; expected JSON") from error
    token = config.get("eos_token") if isinstance(config, dict) else None
    if isinstance(token, dict):
        token = token.get("content")
    if not isinstance(token, str | None):
        raise ValueError(f"{file} has the eos_token {token!r}; expected the text of a token")
    return token
