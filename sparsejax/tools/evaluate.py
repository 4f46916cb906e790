"""Evaluate a run: its newest checkpoint, masks included."""

import os
from pathlib import Path
from typing import Any

from sparsejax.accounting.density import compute_density
from sparsejax.checkpoint.save import restore
from sparsejax.checkpoint.workdir import (
    check_same_run,
    describe_run,
    find_newest_checkpoint,
    keep_schedule,
)
from sparsejax.config.parse import ConfigError
from sparsejax.config.schema import TrainConfig
from sparsejax.report.progress import say
from sparsejax.training.setup import (
    compile_evaluation,
    compute_validation,
    find_phase,
    prepare_run,
)


def evaluate(config: TrainConfig, workdir: str | os.PathLike) -> dict[str, Any]:
    """Restore the newest checkpoint and evaluate it.

    Args:
      config: settings of the run.
      workdir: folder of the run.

    Returns:
      step, phase, validation_loss, validation_accuracy, attention_density and, if the phase has
      sparse weights, weight_density.

    Raises:
      ConfigError: if the folder holds no checkpoint of a run with these settings.
    """
    checkpoints = Path(workdir) / "checkpoints"
    if not checkpoints.is_dir():
        raise ConfigError(f"--workdir={workdir} must hold a run's checkpoints, found none")
    config = keep_schedule(config, checkpoints)
    run = prepare_run(config)
    check_same_run(checkpoints, describe_run(config, run.data.fingerprint, run.data.spec))
    info, problems = find_newest_checkpoint(checkpoints)
    for problem in problems:
        say(f"warning: checkpoint ignored: {problem}")
    if info is None:
        raise ConfigError(f"--workdir={workdir} must hold a whole checkpoint, found none")
    try:
        phase = find_phase(run.recipe, info.metadata["phase"])
        state, _ = restore(info, run.make_abstract_state(phase.name))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    batch = run.put_batch(next(run.data.validation(1)))
    eval_step = compile_evaluation(run, phase, batch)
    block_lists = run.make_block_lists(state, phase)
    validation = compute_validation(run, eval_step, state, block_lists)
    density = compute_density(run.model_config, state.sparsity.masks, phase)
    result = {"step": info.step, "phase": phase.name, **validation}
    result["attention_density"] = float(density.attention.mean())
    if (mean := density.mean_weights) is not None:
        result["weight_density"] = mean
    return result
