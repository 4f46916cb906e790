"""Token files on disk, memory-mapped as random-access examples.

The task decides what examples become. `sparsejax.batch` says what the arrays of an example mean;
here they have no axis for the batch.

Axis letters: B batch, T position in the sequence, P the two documents of a pair, V value of a
patch.
"""

from pathlib import Path

import numpy as np

from sparsejax.batch import Task
from sparsejax.data.patches import PatchGrid
from sparsejax.data.shards import ShardStream
from sparsejax.data.token_files import LABELS, OFFSETS, TOKENS
from sparsejax.data.tokenizer import Tokenizer


def open_examples(
    folder: Path,
    task: Task,
    tokenizer: Tokenizer,
    sequence_length: int,
    *,
    grid: PatchGrid | None = None,
    stream: ShardStream | None = None,
    hidden: bool = False,
) -> "Windows | Documents | Patches":
    """Map what `write_examples` wrote.

    Args:
      folder: Where it was written.
      task: What batches are for.
      tokenizer: With which it was written.
      sequence_length: T.
      grid: How the documents are patches of images; None if they are not.
      stream: Ids in files of their own, which were not written to the folder.
      hidden: Whether the documents say which of their values are hidden.

    Returns:
      The examples.
    """
    match task:
        case "masked_language_model" if hidden:
            return Cloze(folder, tokenizer, sequence_length)
        case "language_model" | "masked_language_model":
            shifted = task == "language_model"
            tokens = map_tokens(folder, tokenizer) if stream is None else stream
            return Windows(tokens, sequence_length, shifted=shifted)
        case "translation":
            return Translations(folder, tokenizer, sequence_length)
        case "classification" if grid:
            return Patches(folder, grid, sequence_length)
        case _:
            return Documents(folder, tokenizer, sequence_length, paired=task == "matching")


def map_tokens(folder: Path, tokenizer: Tokenizer) -> np.ndarray:
    """Map the stream that `write_stream` wrote.

    Args:
      folder: Where it was written.
      tokenizer: With which it was written.

    Returns:
      unsigned[size], the ids.
    """
    return _map_ids(folder / TOKENS, tokenizer.dtype)


class Windows:
    """Language-model examples: consecutive, non-overlapping windows of T + 1 tokens.

    In each, targets[t] = inputs[t + 1]; or, of windows of T tokens, targets[t] = inputs[t], for
    masking to hide some inputs.
    """

    def __init__(
        self, tokens: np.ndarray | ShardStream, sequence_length: int, *, shifted: bool = True
    ):
        """Cut a stream of ids.

        Args:
          tokens: unsigned[size], of `map_tokens` or of shards.
          sequence_length: T.
          shifted: Whether the targets are the next tokens.
        """
        self._tokens = tokens
        self._length, self._shift = sequence_length, int(shifted)
        self._width = self._length + self._shift

    def __len__(self) -> int:
        return self._tokens.size // self._width

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start = int(index) * self._width
        window = self._tokens[start : start + self._width].astype(np.int32)
        return {
            "inputs": window[: self._length],
            "targets": window[self._shift :],
            "loss_weights": np.ones((), np.float32),
        }


class Documents:
    """Labelled examples, padded with id 0 to T; the tokenizer's ids are shifted up by one."""

    # Ids that an example adds to each document.
    _num_added = 0

    def __init__(self, folder: Path, tokenizer: Tokenizer, sequence_length: int, paired: bool):
        """Map the documents that `write_documents` wrote.

        Args:
          folder: Where they were written.
          tokenizer: With which they were written.
          sequence_length: T.
          paired: Whether each example has two documents.
        """
        self._tokens = _map_ids(folder / TOKENS, tokenizer.dtype)
        self._offsets = np.load(folder / OFFSETS)
        self._labels = np.load(folder / LABELS)
        self._sequence_length = sequence_length
        self._per_example = 2 if paired else 1

    def __len__(self) -> int:
        return self._labels.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        first = int(index) * self._per_example
        inputs_PT = np.zeros((self._per_example, self._sequence_length), np.int32)
        for row, document in enumerate(range(first, first + self._per_example)):
            ids = self._read(document)
            inputs_PT[row, : ids.size] = ids
        inputs = inputs_PT if self._per_example == 2 else inputs_PT[0]
        return {
            "inputs": inputs,
            "mask": inputs > 0,
            "labels": self._labels[index],
            "loss_weights": np.ones((), np.float32),
        }

    def _read(self, document: int) -> np.ndarray:
        start, stop = self._offsets[document : document + 2]
        tokens = self._tokens[start : min(stop, start + self._sequence_length)]
        return tokens.astype(np.int32) + 1

    def check_lengths(self, split: str) -> None:
        """Refuse documents longer than T.

        Args:
          split: Name of the split, for the message.

        Raises:
          ValueError: Some documents are longer than `sequence_length`.
        """
        lengths = np.diff(self._offsets) + self._num_added
        longer = int(np.count_nonzero(lengths > self._sequence_length))
        if longer:
            raise ValueError(
                f"sequence_length={self._sequence_length}: {longer} of {lengths.size} documents of "
                f"the {split} split are longer, the longest has {lengths.max()} tokens; expected "
                "at least that, or truncate=True to keep the beginning of each"
            )


class Translations(Documents):
    """Sentences and their translations, padded with id 0 to T.

    The tokenizer's ids are shifted up by one, its separator too: id E, which no sentence holds, and
    which is 1 but of an existing tokenizer. With source s_1 ... s_S and target t_1 ... t_N an item
    has

        inputs           s_1 ... s_S  E
        mask             1   ... 1    1
        decoder_inputs   E  t_1 ... t_N
        targets          t_1 ... t_N  E
        loss_weights     1   ... 1    1

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
        self._end = tokenizer.separator + 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        source, target = (self._read(2 * int(index) + side) for side in (0, 1))
        inputs, targets = (self._pad([*ids, self._end]) for ids in (source, target))
        return {
            "inputs": inputs,
            "mask": inputs > 0,
            "decoder_inputs": self._pad([self._end, *target]),
            "targets": targets,
            "loss_weights": (targets > 0).astype(np.float32),
        }

    def _pad(self, ids: list[int]) -> np.ndarray:
        padded_T = np.zeros(self._sequence_length, np.int32)
        kept = ids[: self._sequence_length]
        padded_T[: len(kept)] = kept
        return padded_T


class Cloze(Documents):
    """Sequences of T values, some of which are hidden: their inputs are the id after the last."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, sequence_length: int):
        """Map the documents that `write_documents` wrote, and which of their values are hidden.

        Args:
          folder: Where they were written.
          tokenizer: With which they were written.
          sequence_length: T.

        Raises:
          ValueError: A sequence has another length.
        """
        super().__init__(folder, tokenizer, sequence_length, paired=True)
        lengths = np.diff(self._offsets)
        if (other := lengths[lengths != sequence_length]).size:
            raise ValueError(
                f"sequence_length={sequence_length}: a sequence with hidden values, or the list of "
                f"them, has {other[0]} positions; expected as many"
            )
        self._mask_id = tokenizer.vocab_size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        values, hidden = (self._read(2 * int(index) + side) - 1 for side in (0, 1))
        return {
            "inputs": np.where(hidden, np.int32(self._mask_id), values),
            "targets": values,
            "loss_weights": hidden.astype(np.float32),
        }


class Patches:
    """Labelled images of equally many patches, padded with zeros to T."""

    def __init__(self, folder: Path, grid: PatchGrid, sequence_length: int):
        """Map the documents that `write_documents` wrote.

        Args:
          folder: Where they were written.
          grid: How the images fall into patches.
          sequence_length: T, at least their number.
        """
        self._labels = np.load(folder / LABELS)
        values = _map_ids(folder / TOKENS, np.dtype(np.uint8))
        self._values_NTV = values.reshape(-1, grid.num_patches, grid.patch_values)
        self._sequence_length = sequence_length

    def __len__(self) -> int:
        return self._labels.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        patches_TV = self._values_NTV[index]
        inputs_TV = np.zeros((self._sequence_length, patches_TV.shape[1]), np.uint8)
        inputs_TV[: len(patches_TV)] = patches_TV
        return {
            "inputs": inputs_TV,
            "mask": np.arange(self._sequence_length) < len(patches_TV),
            "labels": self._labels[index],
            "loss_weights": np.ones((), np.float32),
        }


def _map_ids(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")
