"""From random-access examples to batches: shuffled and endless, or in order and finite."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

type Batch = dict[str, np.ndarray]
type Transform = Callable[[Batch, np.random.Generator], Batch]

_READ_AHEAD_BATCHES = 16
# No run has it: seeds of runs are below.
_VALIDATION_SEED = 2**32


class ExampleSource(Protocol):
    """Random access to the examples of a split."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...


class JoinedExamples:
    """The examples of several splits, one split after the other."""

    def __init__(self, parts: Sequence[ExampleSource]):
        """Join examples.

        Args:
          parts: Those of each split.
        """
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __getitem__(self, index: int) -> Batch:
        for part in self._parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError("there are not so many examples")


class BatchIterator(Protocol):
    """Endless batches, with a state that says which comes next."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, int]:
        """Return the position in the stream.

        Returns:
          `{"next_index": n}` after n batches.
        """
        ...

    def set_state(self, state: dict[str, int]) -> None:
        """Go to a position, forwards or backwards.

        Args:
          state: What `get_state` returned.
        """
        ...


def make_train_iterator(
    examples: ExampleSource,
    *,
    batch_size: int,
    seed: int,
    num_reading_threads: int,
    process_index: int,
    process_count: int,
    transform: Transform | None = None,
) -> BatchIterator:
    """Make the endless iterator over shuffled batches.

    All epochs form one stream, each in its own order, in which every example occurs once per epoch;
    batches may span two epochs. The processes take turns along the batches of the stream: one after
    the other they are the batch of one process, in its order, whatever their number.

    Args:
      examples: The training split.
      batch_size: Examples per batch of this process.
      seed: Fixes the order.
      num_reading_threads: 0 or 1.
      process_index: This process.
      process_count: Number of processes.
      transform: Changes each example at random. What it draws depends on the seed and on the
        example's position in the stream alone: other numbers in every epoch, the same ones
        after a restart.

    Returns:
      Iterator with `get_state` and `set_state`; a state holds `next_index` alone.
    """
    import grain

    stream = grain.MapDataset.source(examples).seed(seed).shuffle().repeat()
    if transform is not None:
        stream = stream.map_with_index(_draw_by_position(transform, seed))
    return iter(
        stream.batch(batch_size, drop_remainder=True)
        .slice(slice(process_index, None, process_count))
        .to_iter_dataset(
            grain.ReadOptions(
                num_threads=num_reading_threads,
                prefetch_buffer_size=num_reading_threads * _READ_AHEAD_BATCHES,
            )
        )
    )


def make_evaluation(
    examples: ExampleSource,
    *,
    batch_size: int,
    process_index: int,
    process_count: int,
    transform: Transform | None = None,
) -> Callable[[int | None], Iterator[Batch]]:
    """Make the function that opens a pass over a split in one order.

    The order is shuffled once and for all, whatever the run's seed, so that a few batches stand for
    the whole split and are the same in every run. What the last batch lacks is filled with
    copies of its last example at weight 0: a real example, so that no loss of it can be NaN.

    Args:
      examples: The split.
      batch_size: Examples per batch of this process.
      process_index: This process.
      process_count: Number of processes.
      transform: Changes each example at random, in the same way at every pass of every run.

    Returns:
      Function of the largest number of batches (None = all) that returns a finite iterator.
    """
    import grain

    shuffled = grain.MapDataset.source(examples).shuffle(seed=0)
    if transform is not None:
        shuffled = shuffled.map_with_index(_draw_by_position(transform, _VALIDATION_SEED))
    global_batch_size = batch_size * process_count

    def evaluate(max_batches: int | None = None) -> Iterator[Batch]:
        num_batches = -(-len(examples) // global_batch_size)
        if max_batches is not None:
            num_batches = min(num_batches, max_batches)
        for start in range(0, num_batches * global_batch_size, global_batch_size):
            first = start + process_index * batch_size
            positions = range(first, first + batch_size)
            yield _stack([_take_or_fill(shuffled, position) for position in positions])

    return evaluate


def _draw_by_position(transform: Transform, seed: int) -> Callable[[int, Batch], Batch]:
    def apply(position: int, example: Batch) -> Batch:
        key = np.array([seed, position], np.uint64)
        return transform(example, np.random.Generator(np.random.Philox(key=key)))

    return apply


def _take_or_fill(examples: Any, position: int) -> Batch:
    if position < len(examples):
        return examples[position]
    last = examples[len(examples) - 1]
    return last | {"loss_weights": np.zeros_like(last["loss_weights"])}


def _stack(examples: list[Batch]) -> Batch:
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}
