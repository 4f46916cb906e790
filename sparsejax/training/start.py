"""Where a run begins: at step 0, or at the newest checkpoint of its folder."""

from pathlib import Path
from typing import Any, NamedTuple

from sparsejax.accounting.ledger import FlopsByPhase
from sparsejax.checkpoint.files import CheckpointInfo, check_free_space
from sparsejax.checkpoint.save import count_bytes, restore
from sparsejax.checkpoint.workdir import check_same_run, find_newest_checkpoint, read_choices
from sparsejax.checks import check_setting
from sparsejax.config.parse import ConfigError
from sparsejax.processes import decide
from sparsejax.recipes import Phase
from sparsejax.report.progress import say
from sparsejax.training.initial import create_initial_state
from sparsejax.training.setup import Run, find_phase
from sparsejax.training.state import TrainState


class Start(NamedTuple):
    """What a run goes on from.

    Attributes:
      step: steps done.
      state: TrainState of that step; None in a finished run.
      phase: its phase.
      totals: FLOPs spent so far; None at step 0.
      checkpoint: where the state comes from; None at step 0.
    """

    step: int
    state: TrainState | None
    phase: Phase
    totals: FlopsByPhase | None
    checkpoint: CheckpointInfo | None


def open_or_resume(run: Run, workdir: Path, description: dict[str, Any]) -> Start:
    """Initialise a run, or restore its newest checkpoint and the position in the data.

    Args:
      run: the run.
      workdir: its folder.
      description: of the run, see `describe_run`.

    Raises:
      ConfigError: if the folder belongs to a run of other settings or data, holds no whole
        checkpoint among several, or has not enough room.
    """
    config, checkpoints = run.config, workdir / "checkpoints"
    if config.num_steps > config.schedule_length:
        say(
            f"note: the schedule ends at step {config.schedule_length}; the steps after it train "
            "at its last rate"
        )
    for line in check_same_run(checkpoints, description):
        say(f"note: {line}")
    info, problems = find_newest_checkpoint(checkpoints)
    for problem in problems:
        say(f"warning: checkpoint ignored: {problem}")
    try:
        if info is None:
            return _open(run, checkpoints)
        phase, totals = _read_metadata(run, info)
        check_setting(
            config.num_steps >= info.step,
            "num_steps",
            config.num_steps,
            f"at least {info.step}, the step that {workdir} has reached",
        )
        if info.step == config.num_steps:
            return Start(info.step, None, phase, totals, info)
        state, data_state = restore(info, run.make_abstract_state(phase.name))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        run.data.train.set_state(data_state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{info.path} must record a position in the data, got {str(data_state)[:60]!r}"
        ) from error
    run.choices.update(read_choices(checkpoints))
    return Start(info.step, state, phase, totals, info)


def _read_metadata(run: Run, info: CheckpointInfo) -> tuple[Phase, FlopsByPhase]:
    phase, totals = info.metadata.get("phase"), info.metadata.get("flops")
    if not isinstance(phase, str) or not isinstance(totals, dict):
        raise ValueError(
            f"{info.path} must record its phase and FLOPs, got {str(info.metadata)[:60]!r}"
        )
    return find_phase(run.recipe, phase), totals


def _open(run: Run, checkpoints: Path) -> Start:
    phase, kept = run.recipe.phases[0], run.config.checkpoint
    needed = count_bytes(run.make_abstract_state(phase.name))
    # All that are kept, and the one being written before the oldest goes.
    most = needed * (kept.keep_last + kept.keep_best + 1)
    decide(lambda: check_free_space(checkpoints, most))
    return Start(0, create_initial_state(run), phase, None, None)
