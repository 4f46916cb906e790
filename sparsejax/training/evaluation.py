"""Validation during a run, and of a finished one."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from sparsejax.recipes import Phase
from sparsejax.training.checkpoint import restore
from sparsejax.training.config import TrainConfig
from sparsejax.training.density import compute_density
from sparsejax.training.progress import say
from sparsejax.training.run import Run, compile_evaluation, prepare_run
from sparsejax.training.settings import ConfigError
from sparsejax.training.state import TrainState
from sparsejax.training.workdir import check_same_run, describe_run, find_newest_checkpoint


def evaluate(
    config: TrainConfig, settings: Mapping[str, Any], workdir: str | os.PathLike
) -> dict[str, Any]:
    """Restore the newest checkpoint, masks included, and evaluate it.

    Args:
      config: TrainConfig.
      settings: the nested mapping that `config` was parsed from.
      workdir: folder of a run.

    Returns:
      dict with step, phase, validation_loss, validation_accuracy, attention_density and, if the
      phase has sparse weights, weight_density.

    Raises:
      ConfigError: if the folder holds no checkpoint of a run with these settings.
    """
    checkpoints = Path(workdir) / "checkpoints"
    if not checkpoints.is_dir():
        raise ConfigError(f"--workdir={workdir} must hold a run's checkpoints, found none")
    run = prepare_run(config)
    check_same_run(checkpoints, describe_run(settings, run.data.fingerprint))
    info, problems = find_newest_checkpoint(checkpoints)
    for problem in problems:
        say(f"warning: checkpoint ignored: {problem}")
    if info is None:
        raise ConfigError(f"--workdir={workdir} must hold a whole checkpoint, found none")
    try:
        phase = find_phase(run, info.metadata["phase"])
        state, _ = restore(info, run.make_abstract_state(phase.name))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    batch = run.put(next(run.data.validation(1)))
    eval_step = compile_evaluation(run, phase, batch)
    result = {"step": info.step, "phase": phase.name, **compute_validation(run, eval_step, state)}
    density = compute_density(run.model, state.sparsity.masks, phase)
    result["attention_density"] = float(density.attention.mean())
    if (mean := density.mean_weights) is not None:
        result["weight_density"] = mean
    return result


def compute_validation(run: Run, eval_step: Callable, state: TrainState) -> dict[str, float]:
    """Average loss and accuracy over the configured number of validation batches.

    Args:
      run: Run.
      eval_step: compiled for the state's phase.
      state: TrainState.

    Returns:
      dict with "validation_loss" in nats per token or example and "validation_accuracy".
    """
    totals = {"loss": 0.0, "correct": 0.0, "count": 0.0}
    for batch in run.data.validation(run.config.num_eval_batches or None):
        sums = jax.device_get(eval_step(state, run.put(batch)))
        totals = {name: totals[name] + float(sums[name]) for name in totals}
    return {
        "validation_loss": totals["loss"] / totals["count"],
        "validation_accuracy": totals["correct"] / totals["count"],
    }


def find_phase(run: Run, name: str) -> Phase:
    """Return a phase of the run's recipe by name.

    Args:
      run: Run.
      name: str.

    Returns:
      Phase.

    Raises:
      ValueError: if the recipe has no such phase.
    """
    for phase in run.recipe.phases:
        if phase.name == name:
            return phase
    raise ValueError(f"the checkpoint's phase {name!r} is not one of {run.recipe.name!r}")
