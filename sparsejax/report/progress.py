"""What a run tells the person who watches it: progress lines and the closing summary."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sparsejax.accounting.ledger import FlopsByPhase, format_flops, summarise_flops


def say(text: str) -> None:
    """Print one line at once."""
    print(text, flush=True)


class StepTimer:
    """Time from the end of one step to the end of the next.

    `interrupt` marks work between two steps (validation, compilation), so that the interval
    around it is not taken for a step.
    """

    def __init__(self):
        self._last: float | None = None

    def interrupt(self) -> None:
        """Forget the last step's end."""
        self._last = None

    def lap(self) -> float | None:
        """Note the end of a step.

        Returns:
          float, seconds since the end of the step before; None after an interruption.
        """
        now = time.perf_counter()
        seconds = None if self._last is None else now - self._last
        self._last = now
        return seconds


def format_progress(
    row: Mapping[str, Any],
    *,
    num_steps: int,
    step_seconds: float | None,
    shown: Mapping[str, float] | None = None,
) -> str:
    """Write one progress line.

    Args:
      row: metrics of a training step: step, phase, loss, tokens_per_second, density; the
        weight_density of a phase that has sparse weights.
      num_steps: steps of the whole run.
      step_seconds: recent seconds per step, if known.
      shown: further numbers by label.

    Example:
      >>> row = {"step": 20, "phase": "dense", "loss": 2.5, "density": 1.0}
      >>> format_progress(row, num_steps=100, step_seconds=None)
      'dense  | step   20/100 | loss 2.5000 | attention density 1.000'
    """
    parts = [
        f"{row['phase']:<6}",
        f"step {row['step']:>{len(str(num_steps)) + 1}}/{num_steps}",
        f"loss {row['loss']:.4f}",
        f"attention density {row['density']:.3f}",
    ]
    if "weight_density" in row:
        parts.append(f"weight density {row['weight_density']:.3f}")
    parts += [f"{label} {value:.4f}" for label, value in (shown or {}).items()]
    if step_seconds:
        parts.append(f"{_format_rate(row['tokens_per_step'] / step_seconds)} tokens/s")
        parts.append(f"{_format_duration((num_steps - row['step']) * step_seconds)} left")
    return " | ".join(parts)


def summarise(
    rows: Sequence[Mapping[str, Any]],
    totals: FlopsByPhase,
    *,
    phases: Sequence[str],
    tokens_per_step: int,
) -> dict[str, Any]:
    """Condense a run's metrics into a flat dict.

    Args:
      rows: lines of `metrics.jsonl`.
      totals: FLOPs of the run.
      phases: names of the recipe's phases, in order.

    Returns:
      dict of scalars: last and best validation loss; those of `summarise_flops`; and for each phase
      that ran its median step time in seconds, tokens per second, mean densities, and memory of a
      step. "phase_metrics" is a dict, phase -> metrics of the recipe as it began, if it has any.
    """
    validations = [row for row in rows if row["kind"] == "validation"]
    summary: dict[str, Any] = {}
    if validations:
        last = validations[-1]
        summary["validation_loss"] = last["validation_loss"]
        summary["validation_accuracy"] = last["validation_accuracy"]
        summary["best_validation_loss"] = min(row["validation_loss"] for row in validations)
    for row in rows:
        if row["kind"] == "phase":
            summary[f"{row['phase']}_first_step"] = row["step"]
            summary[f"{row['phase']}_attention_density"] = row["density"]
            summary[f"{row['phase']}_step_memory_bytes"] = row["step_memory_bytes"]
            if row.get("recipe"):
                summary.setdefault("phase_metrics", {})[row["phase"]] = row["recipe"]
    summary |= summarise_flops(totals)
    for phase in phases:
        steps = [row for row in rows if row["kind"] == "train" and row["phase"] == phase]
        densities = [row["weight_density"] for row in steps if "weight_density" in row]
        if densities:
            summary[f"{phase}_weight_density"] = statistics.fmean(densities)
        seconds = [row["step_seconds"] for row in steps if "step_seconds" in row]
        if seconds:
            summary[f"{phase}_step_seconds"] = statistics.median(seconds)
            summary[f"{phase}_tokens_per_second"] = tokens_per_step / statistics.median(seconds)
    if {"dense_step_seconds", "sparse_step_seconds"} <= set(summary):
        summary["sparse_step_speedup"] = (
            summary["dense_step_seconds"] / summary["sparse_step_seconds"]
        )
    return summary


def format_summary(
    summary: Mapping[str, Any], totals: FlopsByPhase, *, phases: Sequence[str]
) -> str:
    """Write the closing summary for a person.

    Args:
      summary: what `summarise` returned, and where things are: "workdir", "checkpoint".
      totals: FLOPs of the run.
      phases: names of the recipe's phases, in order.

    Returns:
      str of several lines.
    """
    lines = [f"finished {summary['num_steps']} steps"]
    if "validation_loss" in summary:
        lines.append(
            f"  validation loss    {summary['validation_loss']:.4f}"
            f" (accuracy {summary['validation_accuracy']:.3f})"
        )
    for phase in phases:
        if f"{phase}_step_seconds" in summary:
            lines.append(
                f"  {phase + ' phase':<18} {_format_rate(summary[f'{phase}_tokens_per_second'])}"
                f" tokens/s, {summary[f'{phase}_step_seconds'] * 1e3:.0f} ms/step,"
                f" {_format_density(summary, phase)},"
                f" {summary[f'{phase}_step_memory_bytes'] / 1e6:,.0f} MB per step"
            )
        elif f"{phase}_first_step" not in summary:
            reason = f": it waited until {w}" if (w := summary.get("waited_until")) else ""
            lines.append(f"  {phase + ' phase':<18} never began{reason}")
    if "sparse_step_speedup" in summary:
        lines.append(
            f"  sparse phase       from step {summary['sparse_first_step']},"
            f" a step is {summary['sparse_step_speedup']:.2f}x faster than in the dense phase"
        )
    for phase, metrics in summary.get("phase_metrics", {}).items():
        known = (f"{name.replace('_', ' ')} {_format_layers(x)}" for name, x in metrics.items())
        lines.append(f"  {phase + ' phase':<18} began with {', '.join(known)}")
    lines += [f"  {line}" for line in format_flops(totals)]
    lines.append(f"  pictures, metrics  {summary['workdir']}")
    lines.append(f"  checkpoint         {summary['checkpoint']}")
    return "\n".join(lines)


def _format_density(summary: Mapping[str, Any], phase: str) -> str:
    text = f"attention density {summary[f'{phase}_attention_density']:.3f}"
    if f"{phase}_weight_density" in summary:
        text += f", weight density {summary[f'{phase}_weight_density']:.3f}"
    return text


def _format_layers(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.2f}" for value in values) + "]"


def _format_rate(rate: float) -> str:
    return f"{rate / 1e6:.2f}M" if rate >= 1e6 else f"{rate / 1e3:.1f}k"


def _format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
