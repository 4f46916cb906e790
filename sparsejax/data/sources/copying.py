"""Copying tasks, as `data/copying.py` draws them."""

import functools
from collections.abc import Iterator
from typing import cast

from sparsejax.data.config import DataConfig
from sparsejax.data.copying import Copying, Half, draw_copies
from sparsejax.data.source import Contents, Example, Options, Source, Split

OPTIONS = Options({"copy_block", "copy_symbols", "copy_permutation", "copy_examples"})

_TRAIN_PER_VALIDATION = 10
# Changes whenever other sequences are drawn.
_VERSION = 1


def describe_copying(config: DataConfig) -> Contents:
    """Describe the set without drawing it.

    Args:
      config: Settings with `source="copying:KIND"`.

    Returns:
      Its contents.

    Raises:
      ValueError: A half has no two blocks, or too few symbols for their beginnings to differ.
    """
    _find_half(config)
    return Contents("masked_language_model", num_values=config.copy_symbols)


def open_copying(config: DataConfig) -> Source:
    """Open a copying task; validation has a tenth of the training examples.

    Args:
      config: Settings with `source="copying:KIND"`.

    Returns:
      The set; an example is its symbols, and which of them are hidden.

    Raises:
      ValueError: As `describe_copying`.
    """
    copying, half = cast(Copying, config.rest), _find_half(config)
    counts = {
        "train": config.copy_examples,
        "validation": config.copy_examples // _TRAIN_PER_VALIDATION,
    }
    draw = functools.partial(draw_copies, copying, half, permutation=config.copy_permutation)

    def read(split: Split) -> Iterator[Example]:
        # Each split has a seed of its own.
        drawn = draw(seed=list(counts).index(split), num_examples=counts[split])
        return map(Example, drawn)

    return Source(
        contents=describe_copying(config),
        identity={
            "copying": copying,
            "version": _VERSION,
            **half._asdict(),
            **counts,
            "permutation": config.copy_permutation,
        },
        read=read,
    )


def _find_half(config: DataConfig) -> Half:
    positions, block, symbols = (
        config.sequence_length // 2,
        config.copy_block,
        config.copy_symbols,
    )
    if config.sequence_length % (2 * block) or positions < 2 * block:
        raise ValueError(
            f"copy_block={block}: expected half of sequence_length={config.sequence_length} to be "
            "two blocks or more"
        )
    half = Half(positions // block, block, symbols)
    if config.rest == "associative_recall" and half.num_blocks > symbols:
        raise ValueError(
            f"copy_symbols={symbols}: expected at least {half.num_blocks}, so that blocks begin "
            "differently"
        )
    return half
