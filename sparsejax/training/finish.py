"""What a run leaves when its last step is done: summary, FLOPs and pictures."""

from pathlib import Path
from typing import Any

import jax

from sparsejax.accounting.ledger import check_totals
from sparsejax.checkpoint.files import CheckpointInfo
from sparsejax.config.parse import ConfigError
from sparsejax.durable import write_durably
from sparsejax.processes import decide
from sparsejax.report.metrics import find_missing_steps, format_steps, read_metrics
from sparsejax.report.plots.training import plot_training
from sparsejax.report.progress import format_summary, say, summarise
from sparsejax.strict_json import dump_json
from sparsejax.training.describe import make_title
from sparsejax.training.setup import Run, find_phase


def finish_run(run: Run, workdir: Path, last: CheckpointInfo | None) -> dict[str, Any]:
    """Write the summary, the FLOPs and the pictures of a run whose last step is done.

    What its metrics lack, they lack too; a warning says what that is. Of several processes the
    first does it, and the others wait.

    Args:
      run: the run.
      workdir: its folder.
      last: its last checkpoint.

    Returns:
      Scalars by name, also written to `summary.json`.

    Raises:
      ConfigError: if `metrics.jsonl` cannot be read, or an earlier version wrote it.
      OSError: if a file cannot be written.
    """
    assert last is not None, "a run that has ended has a checkpoint"
    return decide(lambda: _finish(run, workdir, last))


def _finish(run: Run, workdir: Path, last: CheckpointInfo) -> dict[str, Any]:
    totals, rows = last.metadata["flops"], _read_rows(workdir, last)
    phases = [phase.name for phase in run.recipe.phases]
    summary = {
        "recipe": run.recipe.name,
        "seed": run.config.seed,
        "num_steps": run.config.num_steps,
        **summarise(rows, totals, phases=phases, tokens_per_step=run.tokens_per_step),
        "workdir": str(workdir),
        "checkpoint": str(last.path),
        "device": jax.devices()[0].device_kind,
    }
    phase = find_phase(run.recipe, last.metadata["phase"])
    if phase is not run.recipe.phases[-1]:
        summary["waited_until"] = phase.ends_when
    write_durably(workdir / "summary.json", dump_json(summary) + "\n")
    write_durably(workdir / "flops.json", dump_json(totals) + "\n")
    if any("loss" in row or "validation_loss" in row for row in rows):
        plot_training(rows, path=workdir / "training.png", title=make_title(run, workdir))
        run.recipe.draw_run(rows, folder=workdir)
    say(format_summary(summary, totals, phases=phases))
    return summary


def _read_rows(workdir: Path, last: CheckpointInfo) -> list[dict[str, Any]]:
    """Read what is there of a finished run's metrics, and say what is not."""
    path = workdir / "metrics.jsonl"
    try:
        check_totals(last.metadata["flops"])
        rows = read_metrics(path) if path.exists() else []
    except ValueError as error:
        raise ConfigError(str(error)) from error
    missing = find_missing_steps(rows, num_steps=last.step)
    if missing:
        say(f"warning: {path} lacks steps {format_steps(missing)}; summary and pictures do too")
    return rows
