"""What all pictures of a run share: colours, marks of phases, smoothing, and how they are saved."""

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsejax.durable import write_durably

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6E6E6E"
_DPI = 150
_POINTS = 72
_ROW_POINTS = 11
# Of a letter of "small" text, on the safe side.
_LETTER_POINTS = 5.5


def make_figure(width: float, height: float, *, title: str = "") -> Figure:
    """Return an empty picture.

    Args:
      width: inches.
      height: inches.
      title: str above it.
    """
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    if title:
        figure.suptitle(title)
    return figure


def measure_note(note: str) -> tuple[float, float]:
    """Return width and height of a note in small letters, inches.

    Args:
      note: str, of any number of lines.
    """
    lines = note.splitlines()
    longest = max((len(line) for line in lines), default=0)
    return _LETTER_POINTS * longest / _POINTS, 0.2 * len(lines)


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Save a picture whole, in one step, so that whoever watches a run never sees a part of it.

    Args:
      figure: what is drawn.
      path: PNG file.

    Raises:
      OSError: if it cannot be written.
    """
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_durably(Path(path), content.getvalue())


def list_phases(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """List the phases of a run, each with the last step before it.

    Args:
      rows: lines of `read_metrics`; rows of training steps tell where rows of phases are missing.

    Returns:
      list of (name, last step before it), in order.
    """
    first: dict[str, int] = {}
    for row in rows:
        if row.get("kind") in ("phase", "train"):
            first.setdefault(row["phase"], row["step"] - (row["kind"] == "train"))
    return list(first.items())


def mark_phases(panels: Sequence[Axes], phases: Sequence[tuple[str, int]]) -> None:
    """Mark where phases begin: a line in every panel, and the names above the first.

    Names that would overlap stand on several rows. A single phase is not marked.

    Args:
      panels: from top to bottom, with the limits they will have along x.
      phases: (name, last step before it), in order.
    """
    if len(phases) < 2:
        return
    for panel in panels:
        for _, step in phases[1:]:
            panel.axvline(step, color=GREY, linestyle="--", linewidth=1)
    first, last = panels[0].get_xlim()
    figure = panels[0].get_figure()
    assert isinstance(figure, Figure)
    # Of the panel's width, what the labels of its axis take is about a tenth.
    width = 0.9 * figure.get_size_inches()[0] * _POINTS
    free_from: list[float] = []
    for name, step in phases:
        share = min(max((step - first) / (last - first), 0.0), 1.0)
        label = f"{name} from step {step}" if step else name
        needed = _LETTER_POINTS * len(label)
        at_right = share * width + needed > width
        begin = width - needed if at_right else share * width
        row = next((i for i, free in enumerate(free_from) if free <= begin), len(free_from))
        free_from[row : row + 1] = [begin + needed]
        panels[0].annotate(
            label,
            (1.0 if at_right else share, 1),
            xycoords="axes fraction",
            xytext=(0, 4 + _ROW_POINTS * row),
            textcoords="offset points",
            ha="right" if at_right else "left",
            fontsize="small",
            color=GREY,
        )


def plot_smoothed(
    panel: Axes,
    steps: Sequence[int],
    values: Sequence[float],
    *,
    phases: Sequence[tuple[str, int]],
    color: str,
    label: str,
) -> None:
    """Draw a noisy curve faintly, and over it its running mean in each phase.

    A mean is over a fiftieth of all values; fewer than 100 values are drawn as they are.

    Args:
      panel: where.
      steps: along x.
      values: along y.
      phases: (name, last step before it), in order; no mean crosses into another phase.
      color: of both.
      label: of the mean, or of the curve itself where there is none.
    """
    if len(values) < 100:
        panel.plot(steps, values, color=color, linewidth=1, label=label)
        return
    panel.plot(steps, values, color=color, linewidth=0.6, alpha=0.3)
    bounds = np.searchsorted(steps, [first for _, first in phases[1:]], side="right")
    parts = np.split(np.asarray(values, np.float64), bounds)
    mean = np.concatenate([smooth_values(part, half=len(values) // 100) for part in parts])
    panel.plot(steps, mean, color=color, linewidth=1.5, label=label)


def smooth_values(values: np.ndarray, *, half: int) -> np.ndarray:
    """Average each value with its neighbours.

    Args:
      values: f64[n], in order; those that are not finite are left out of the means.
      half: neighbours on each side; the ends have fewer.

    Returns:
      f64[n], NaN where no neighbour is finite.
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    number = counts[high] - counts[low]
    means = (sums[high] - sums[low]) / np.maximum(number, 1)
    return np.where(number > 0, means, np.nan)


def select(rows: Iterable[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of the rows that have a value by this name.

    Args:
      rows: lines of `read_metrics`.
      name: of a number.
    """
    found = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in found], [value for _, value in found]


def tidy(panel: Axes) -> None:
    """Draw a light grid and no frame above and beside it.

    Args:
      panel: what is tidied.
    """
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
