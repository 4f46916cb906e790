"""Validation during a run, and of a finished one."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsejax.accounting.density import compute_density
from sparsejax.checkpoint.save import restore
from sparsejax.checkpoint.workdir import check_same_run, describe_run, find_newest_checkpoint
from sparsejax.config import ConfigError, TrainConfig
from sparsejax.report.progress import say
from sparsejax.training.setup import (
    compile_evaluation,
    compute_validation,
    find_phase,
    prepare_run,
)


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
