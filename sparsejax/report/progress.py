"""What a run tells the person who watches it: progress lines and the closing summary."""

import collections
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparsejax.accounting.ledger import FlopsByPhase, format_flops, summarise_flops
from sparsejax.accounting.units import format_quantity
from sparsejax.processes import is_first

_RECENT_STEPS = 50


def say(text: str) -> None:
    """Print one line at once; of several processes the first does."""
    if is_first():
        print(text, flush=True)


class StepTimer:
    """Time from the end of one step to the end of the next.

    `interrupt` marks work between two steps (validation, compilation), so that the interval
    around it is not taken for a step.
    """

    def __init__(self):
        self._last: float | None = None
        self._recent: collections.deque[float] = collections.deque(maxlen=_RECENT_STEPS)

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
        if seconds is not None:
            self._recent.append(seconds)
        return seconds

    @property
    def typical_seconds(self) -> float | None:
        """Median of the recent steps, which one slow step does not move; None before the first."""
        return statistics.median(self._recent) if self._recent else None


def format_progress(
    row: Mapping[str, Any],
    *,
    num_steps: int,
    tokens_per_step: int,
    step_seconds: float | None,
    shown: Mapping[str, float] | None = None,
) -> str:
    """Write one progress line.

    Args:
      row: metrics of a training step: step, phase, loss, attention_density; the weight_density of
        a phase that has sparse weights.
      num_steps: steps of the whole run.
      tokens_per_step: positions of a batch.
      step_seconds: recent seconds per step, if known.
      shown: further numbers by label.

    Example:
      >>> row = {"step": 20, "phase": "dense", "loss": 2.5, "attention_density": 1.0}
      >>> format_progress(row, num_steps=100, tokens_per_step=800, step_seconds=0.2)
      'dense  | step   20/100 | loss 2.5000 | attention density 1.000 | 4.00k tokens/s | 0m16s left'
    """
    parts = [
        f"{row['phase']:<6}",
        f"step {row['step']:>{len(str(num_steps)) + 1}}/{num_steps}",
        f"loss {row['loss']:.4f}",
        f"attention density {row['attention_density']:.3f}",
    ]
    if "weight_density" in row:
        parts.append(f"weight density {row['weight_density']:.3f}")
    parts += [f"{label} {value:.4f}" for label, value in (shown or {}).items()]
    if step_seconds:
        parts.append(f"{format_quantity(tokens_per_step / step_seconds)} tokens/s")
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
      that ran its first step, median seconds of a step, tokens per second, densities (attention's
      at its beginning, the mean of weights'), and memory of a step. "phase_metrics" is a dict,
      phase -> metrics of the recipe as it began, if it has any. `docs/metrics.md` names them.
    """
    validations = [row for row in rows if row.get("kind") == "validation"]
    summary: dict[str, Any] = {}
    if validations:
        last = validations[-1]
        summary["validation_loss"] = last["validation_loss"]
        summary["validation_accuracy"] = last["validation_accuracy"]
        summary["best_validation_loss"] = min(row["validation_loss"] for row in validations)
    for row in rows:
        if "phase_metrics" in row:
            summary.setdefault("phase_metrics", {})[row["phase"]] = row["phase_metrics"]
    summary |= summarise_flops(totals)
    for phase in phases:
        summary |= {
            f"{phase}_{name}": value
            for name, value in _summarise_phase(
                [row for row in rows if row.get("phase") == phase], tokens_per_step
            ).items()
        }
    if {"dense_step_seconds", "sparse_step_seconds"} <= set(summary):
        summary["sparse_step_speedup"] = (
            summary["dense_step_seconds"] / summary["sparse_step_seconds"]
        )
    return summary


def _summarise_phase(rows: Sequence[Mapping[str, Any]], tokens_per_step: int) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    steps = [row for row in rows if row.get("kind") == "train"]
    for row in rows:
        if "attention_density" in row:
            summary.setdefault("attention_density", row["attention_density"])
        if row.get("kind") == "phase":
            summary["first_step"] = row["step"]
            summary["step_memory_bytes"] = row["step_memory_bytes"]
    if densities := [row["weight_density"] for row in steps if "weight_density" in row]:
        summary["weight_density"] = statistics.fmean(densities)
    if seconds := [row["step_seconds"] for row in steps if "step_seconds" in row]:
        summary["step_seconds"] = statistics.median(seconds)
        summary["tokens_per_second"] = tokens_per_step / summary["step_seconds"]
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
        if figures := _format_phase(summary, phase):
            lines.append(f"  {phase + ' phase':<18} {', '.join(figures)}")
        elif phase not in totals and f"{phase}_first_step" not in summary:
            reason = f": it waited until {w}" if (w := summary.get("waited_until")) else ""
            lines.append(f"  {phase + ' phase':<18} never began{reason}")
    if {"sparse_step_speedup", "sparse_first_step"} <= summary.keys():
        lines.append(
            f"  sparse phase       from step {summary['sparse_first_step']}, a step is"
            f" {format_speedup(summary['sparse_step_speedup'])} than in the dense phase"
        )
    for phase, metrics in summary.get("phase_metrics", {}).items():
        known = format_metrics({name.replace("_", " "): x for name, x in metrics.items()})
        lines.append(f"  {phase + ' phase':<18} began with {known}")
    lines += [f"  {line}" for line in format_flops(totals)]
    lines.append(f"  pictures, metrics  {summary['workdir']}")
    lines.append(f"  checkpoint         {summary['checkpoint']}")
    return "\n".join(lines)


def format_speedup(speedup: float) -> str:
    """Write a ratio of speeds, so that the number is not below 1.

    Example:
      >>> format_speedup(3.734), format_speedup(0.847)
      ('3.73x faster', '1.18x slower')
    """
    return f"{speedup:.2f}x faster" if speedup >= 1 else f"{1 / speedup:.2f}x slower"


def _format_phase(summary: Mapping[str, Any], phase: str) -> list[str]:
    formats: dict[str, Callable[[float], str]] = {
        "tokens_per_second": lambda x: f"{format_quantity(x)} tokens/s",
        "step_seconds": lambda x: f"{x * 1e3:.{0 if x >= 0.01 else 2}f} ms/step",
        "attention_density": lambda x: f"attention density {x:.3f}",
        "weight_density": lambda x: f"weight density {x:.3f}",
        "step_memory_bytes": lambda x: f"{format_quantity(x, 'B')} per step",
    }
    found = {name: summary.get(f"{phase}_{name}") for name in formats}
    return [formats[name](value) for name, value in found.items() if value is not None]


def _format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def format_metrics(values: Mapping[str, Any]) -> str:
    """Write metrics for a person, with three digits.

    Args:
      values: numbers, and lists of them, by name; None where nothing is known.

    Example:
      >>> format_metrics({"check": 3, "distance": [0.12345, None]})
      'check 3, distance [0.123, -]'
    """
    return ", ".join(f"{name} {_format_value(value)}" for name, value in values.items())


def _format_value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_format_value(item) for item in value) + "]"
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) and math.isfinite(value) else str(value)
