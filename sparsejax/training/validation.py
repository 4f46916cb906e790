"""Averages over the batches of a split."""

from collections.abc import Callable, Iterable

import jax
import numpy as np

from sparsejax.training.block_lists import BlockLists
from sparsejax.training.setup import Run
from sparsejax.training.state import TrainState
from sparsejax.training.step import Batch, Metrics


def compute_validation(
    run: Run, eval_step: Callable, state: TrainState, block_lists: BlockLists
) -> dict[str, float]:
    """Average loss and accuracy over the configured number of validation batches.

    Args:
      run: the run.
      eval_step: compiled for the state's phase.
      state: what is evaluated.
      block_lists: of this state.

    Returns:
      "validation_loss" in nats per token or example, and "validation_accuracy".
    """
    batches = run.data.validation(run.config.num_eval_batches or None)
    totals = sum_over_batches(run, lambda batch: eval_step(state, batch, block_lists), batches)
    return {
        "validation_loss": totals["loss"] / totals["count"],
        "validation_accuracy": totals["correct"] / totals["count"],
    }


def sum_over_batches(
    run: Run, function: Callable[[Batch], Metrics], batches: Iterable[dict[str, np.ndarray]]
) -> dict[str, float]:
    """Sum scalars over batches.

    Args:
      run: the run.
      function: returns scalars by name of a batch on the devices.
      batches: this process's parts; at least one.

    Returns:
      The sums, in float64.
    """
    totals: dict[str, float] = {}
    for batch in batches:
        for name, value in jax.device_get(function(run.put_batch(batch))).items():
            totals[name] = totals.get(name, 0.0) + float(value)
    return totals
