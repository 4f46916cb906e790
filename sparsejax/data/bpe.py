"""Byte-level BPE, trained on the spot."""

from collections.abc import Iterable
from pathlib import Path

from sparsejax.data.tokenizer import (
    TOKENIZER_FILE,
    Tokenizer,
    decode_text,
    make_tokenizer,
    read_model,
    shorten_hash,
)
from sparsejax.durable import write_durably

_SEPARATOR_TOKEN = "<|endoftext|>"


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
    bpe.train_from_iterator(map(decode_text, texts), trainer)
    if bpe.get_vocab_size() != vocab_size:
        raise ValueError(
            f"tokenizer='bpe:{vocab_size}': the training split yields only "
            f"{bpe.get_vocab_size()} entries; expected at most that many"
        )
    write_durably(folder / TOKENIZER_FILE, bpe.to_str(pretty=True))


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
    file = folder / TOKENIZER_FILE
    return make_tokenizer(read_model(file), name=name, separator=0, file=file)


def name_bpe(tokenizer: str, digest: str) -> str:
    """Name a trained tokenizer by its file, so that equal names encode equally.

    Args:
      tokenizer: As in `DataConfig`.
      digest: What `cached_folder` returned for the folder that `train_bpe` filled.

    Returns:
      A name that `load_tokenizer` takes.
    """
    return f"{tokenizer}:{shorten_hash(digest)}"
