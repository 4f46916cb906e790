"""What a batch holds: the names, shapes and types of its arrays for every task.

This is the only statement of it. With B examples, T positions and V values of a patch, the arrays
are

  task                     inputs        mask          targets    labels  loss_weights
  language_model           i32[B, T]                   i32[B, T]          f32[B]
  masked_language_model    i32[B, T]                   i32[B, T]          f32[B, T]
  classification           i32[B, T]     bool[B, T]               i32[B]  f32[B]
  classification, patches  u8[B, T, V]   bool[B, T]               i32[B]  f32[B]
  matching                 i32[B, 2, T]  bool[B, 2, T]            i32[B]  f32[B]
  translation              i32[B, T]     bool[B, T]    i32[B, T]          f32[B, T]

and, for translation alone, `decoder_inputs` i32[B, T].

  inputs: what the model reads. Where there is a mask, padding has the id 0. In a masked language
    model, hidden tokens are masked and must be predicted.
  mask: True at real tokens or patches, False at padding.
  targets: the token to predict at each position.
  labels: the class to predict for each example.
  decoder_inputs: the targets, one token behind.
  loss_weights: weight of each prediction in the loss, given for whole examples or for tokens. It is
    0 at padding, at tokens that are not asked for, and for examples that only fill up a batch.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

type Task = Literal[
    "language_model", "masked_language_model", "classification", "matching", "translation"
]


class ArraySpec(NamedTuple):
    """One array of a batch.

    Attributes:
      dtype: np.dtype.
    """

    shape: tuple[int, ...]
    dtype: np.dtype


def describe_batch(
    task: Task, *, batch_size: int, sequence_length: int, patch_values: int = 0
) -> dict[str, ArraySpec]:
    """Return the arrays of a batch, as the table of this module has them.

    Args:
      batch_size: int, examples, B.
      sequence_length: int, positions, T.
      patch_values: int, values of a patch, V; 0 for tokens.

    Returns:
      dict name -> ArraySpec.

    Example:
      >>> describe_batch("language_model", batch_size=8, sequence_length=64)["inputs"]
      ArraySpec(shape=(8, 64), dtype=dtype('int32'))
    """
    example, tokens = (batch_size,), (batch_size, sequence_length)
    ids = ArraySpec(tokens, np.dtype(np.int32))
    token_weights = ArraySpec(tokens, np.dtype(np.float32))
    example_weights = ArraySpec(example, np.dtype(np.float32))
    if task == "language_model":
        return {"inputs": ids, "targets": ids, "loss_weights": example_weights}
    if task == "masked_language_model":
        return {"inputs": ids, "targets": ids, "loss_weights": token_weights}
    if task == "translation":
        return {
            "inputs": ids,
            "mask": ArraySpec(tokens, np.dtype(np.bool_)),
            "decoder_inputs": ids,
            "targets": ids,
            "loss_weights": token_weights,
        }
    if task == "matching":
        tokens = (batch_size, 2, sequence_length)
    inputs = ArraySpec(tokens, np.dtype(np.int32))
    if patch_values:
        inputs = ArraySpec((*tokens, patch_values), np.dtype(np.uint8))
    return {
        "inputs": inputs,
        "mask": ArraySpec(tokens, np.dtype(np.bool_)),
        "labels": ArraySpec(example, np.dtype(np.int32)),
        "loss_weights": example_weights,
    }


def get_targets[Array](batch: Mapping[str, Array]) -> Array:
    """Return what the model must predict.

    Args:
      batch: dict with the arrays of any task.

    Returns:
      The targets, one for each position, or else the labels, one for each example.
    """
    return batch["targets"] if "targets" in batch else batch["labels"]
