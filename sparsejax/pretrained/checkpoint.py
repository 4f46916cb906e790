"""Weights of another library, whatever file they lie in, read one tensor at a time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from sparsejax.data import Tokenizer
from sparsejax.pretrained.leaves import Shape


class Checkpoint(NamedTuple):
    """What a folder or file holds.

    Attributes:
      origin: its path, for messages.
      settings: those of config.json, or the same of another format.
      shapes: of its tensors, in the names of `transformers`.
      read: returns the tensor of a name as a float array.
      load_tokenizer: returns its tokenizer, None where there is none.
    """

    origin: str
    settings: dict[str, Any]
    shapes: dict[str, Shape]
    read: Callable[[str], np.ndarray]
    load_tokenizer: Callable[[], Tokenizer | None]
