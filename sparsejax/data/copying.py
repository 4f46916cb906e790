"""Sequences whose second half copies the first, so that one knows which blocks attention needs.

Legend: N examples, T positions, I blocks of a half, R positions of a block, V symbols.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

type Copying = Literal["hidden_permutation", "fixed_lag", "associative_recall"]

_AT_ONCE = 1024


class Half(NamedTuple):
    """The sizes of a half.

    Attributes:
      num_blocks: I, blocks of one half.
      block_size: positions of a block.
      num_symbols: values of a position.
    """

    num_blocks: int
    block_size: int
    num_symbols: int


def draw_permutation(num_blocks: int, seed: int) -> np.ndarray:
    """Draw which block of the first half each block of the second copies.

    Args:
      num_blocks: I, at least 2.
      seed: equal seeds draw the same.

    Returns:
      int[I], a permutation that leaves no block at its place.

    Example:
      >>> draw_permutation(4, seed=0).tolist()
      [3, 2, 1, 0]
    """
    rng = np.random.default_rng(seed)
    while True:
        source_I = rng.permutation(num_blocks)
        if (source_I != np.arange(num_blocks)).all():
            return source_I


def draw_copies(
    copying: Copying, half: Half, *, permutation: int, seed: int, num_examples: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Draw sequences of which the second half, or most of it, has to be predicted.

    The first half is random. Block i of the second is a copy of block

      i, for "fixed_lag";
      source_i, of one permutation of all examples, for "hidden_permutation";
      source_i, of a permutation of its own, for "associative_recall". There the first symbol of a
        block occurs at the beginning of no other, and is shown.

    Args:
      copying: which.
      half: sizes.
      permutation: seed of the hidden permutation; without effect for others.
      seed: of all else.
      num_examples: N.

    Yields:
      Symbols u8[T], and where they have to be predicted, u8[T] of 0 and 1.
    """
    rng = np.random.default_rng(seed)
    shape = (half.num_blocks, half.block_size)
    hidden_IR = np.ones(shape, np.uint8)
    recalls = copying == "associative_recall"
    if recalls:
        hidden_IR[:, 0] = 0
    hidden_T = np.concatenate([np.zeros_like(hidden_IR), hidden_IR]).ravel()
    source_I = np.arange(half.num_blocks)
    if copying == "hidden_permutation":
        source_I = draw_permutation(half.num_blocks, permutation)
    for first in range(0, num_examples, _AT_ONCE):
        count = min(_AT_ONCE, num_examples - first)
        first_NIR = rng.integers(0, half.num_symbols, (count, *shape), np.uint8)
        source_NI = np.broadcast_to(source_I, (count, half.num_blocks))
        if recalls:
            keys_NV = rng.permuted(np.tile(np.arange(half.num_symbols), (count, 1)), axis=1)
            first_NIR[:, :, 0] = keys_NV[:, : half.num_blocks]
            source_NI = rng.permuted(source_NI, axis=1)
        second_NIR = np.take_along_axis(first_NIR, source_NI[..., None], axis=1)
        halves_NT = np.concatenate([first_NIR, second_NIR], axis=1).reshape(count, -1)
        for symbols_T in halves_NT:
            yield symbols_T, hidden_T
