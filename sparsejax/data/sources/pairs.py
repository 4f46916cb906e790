"""Parallel text for translation: two files per split, and the examples made of them.

Axis letters: T position in the sequence.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sparsejax.data.cache import hash_json
from sparsejax.data.config import DataConfig
from sparsejax.data.source import Example, Source, Split
from sparsejax.data.store import Documents
from sparsejax.data.tokenizer import SEPARATOR, Tokenizer

BOUNDARY = SEPARATOR + 1
"""Id that ends every sentence and begins the input of the decoder; padding is 0."""

_SIDES = ("src", "tgt")


def open_pairs(config: DataConfig) -> Source:
    """Open a folder with `train.src`, `train.tgt`, `validation.src` and `validation.tgt`.

    Line n of a `tgt` file translates line n of its `src` file; both are UTF-8. A line may be empty,
    and a carriage return at its end belongs to the line break.

    Args:
        config: Settings with `source="pairs:/folder"`; split names are the stems of the file names.

    Returns:
        The set: a sentence and its translation per example.

    Raises:
        ValueError: A file is missing, has other lines than its twin, or is not text.
    """
    folder = Path(config.rest)
    names = {
        "train": config.train_split or "train",
        "validation": config.validation_split or "validation",
    }
    files = {split: [folder / f"{name}.{side}" for side in _SIDES] for split, name in names.items()}
    for file in itertools.chain(*files.values()):
        if not file.is_file():
            raise ValueError(f"source='pairs:{folder}': {file.name} is missing")

    def read(split: Split) -> Iterator[Example]:
        with open(files[split][0], "rb") as source, open(files[split][1], "rb") as target:
            for number, lines in enumerate(itertools.zip_longest(source, target), 1):
                if None in lines:
                    ended = files[split][lines.index(None)]
                    raise ValueError(
                        f"{ended} ends after line {number - 1} and its twin does not; expected a "
                        "translation in every line"
                    )
                sentences = (
                    _parse_line(*pair, number) for pair in zip(lines, files[split], strict=True)
                )
                yield Example(tuple(sentences))

    stats = [(file.name, file.stat()) for file in itertools.chain(*files.values())]
    return Source(
        task="translation",
        identity={
            "pairs": hash_json([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
        },
        read=read,
    )


class Translations(Documents):
    """Sentences and their translations, padded with id 0 to T.

    The tokenizer's ids are shifted up by one, its separator too: id 1, `BOUNDARY`, which no
    sentence holds. With source s_1 ... s_S and target t_1 ... t_N an item has

        inputs           s_1 ... s_S  1           int32[T]
        mask             1   ... 1    1           bool[T]
        decoder_inputs   1  t_1 ... t_N           int32[T]
        targets          t_1 ... t_N  1           int32[T]
        weights          1   ... 1    1           float32[T]

    each padded with zeros. What is longer is cut to its first T, and then has no end.

    References:
        fairseq begins the decoder's input with the end of the sentence, too.
    """

    _num_added = 1

    def __init__(self, folder: Path, tokenizer: Tokenizer, sequence_length: int):
        """Map the pairs that `write_documents` wrote.

        Args:
            folder: Where they were written.
            tokenizer: With which they were written.
            sequence_length: T.
        """
        super().__init__(folder, tokenizer, sequence_length, paired=True)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        source, target = (self._read(2 * int(index) + side) for side in (0, 1))
        inputs, targets = (self._pad([*ids, BOUNDARY]) for ids in (source, target))
        return {
            "inputs": inputs,
            "mask": inputs > 0,
            "decoder_inputs": self._pad([BOUNDARY, *target]),
            "targets": targets,
            "weights": (targets > 0).astype(np.float32),
        }

    def _pad(self, ids: list[int]) -> np.ndarray:
        padded_T = np.zeros(self._sequence_length, np.int32)
        kept = ids[: self._sequence_length]
        padded_T[: len(kept)] = kept
        return padded_T


def _parse_line(line: bytes, path: Path, number: int) -> bytes:
    text = line.rstrip(b"\r\n")
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}, line {number} is not UTF-8 at byte {error.start}; expected one sentence per "
            "line in UTF-8"
        ) from error
    if b"\0" in text:
        raise ValueError(f"{path}, line {number} holds the byte 0; expected text, which has none")
    return text
