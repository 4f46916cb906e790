"""Draw a run: its losses and speed over the steps."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#6E6E6E"
_DPI = 150


def plot_training(
    rows: Sequence[Mapping[str, Any]],
    *,
    switch_steps: Mapping[str, int],
    path: str | os.PathLike,
) -> None:
    """Draw the losses, and below them the speed, with the changes of phase marked.

    Args:
      rows: lines of `read_metrics`; drawn are "loss" and "validation_loss", and of
        "tokens_per_second" and "step_seconds" the first that occurs.
      switch_steps: first step of each later phase by its name, such as {"sparse": 400}.
      path: PNG file to write.

    Raises:
      ValueError: if no row has a loss.
    """
    train, validation = _select(rows, "loss"), _select(rows, "validation_loss")
    if not (train[0] or validation[0]):
        raise ValueError(f"rows must contain 'loss' or 'validation_loss', got {len(rows)} rows")
    speeds = {
        "tokens_per_second": "throughput (tokens/s)",
        "step_seconds": "time per step (s)",
    }
    speed = next((name for name in speeds if _select(rows, name)[0]), None)

    figure = Figure(figsize=(8, 6 if speed else 4), dpi=_DPI, layout="constrained")
    ratios = [2, 1] if speed else [1]
    panels = figure.subplots(
        len(ratios), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios}
    )[:, 0]
    if train[0]:
        panels[0].plot(*train, color=_BLUE, linewidth=1, label="training")
    if validation[0]:
        panels[0].plot(*validation, "o-", color=_ORANGE, markersize=4, label="validation")
    panels[0].set_ylabel("loss (nats)")
    panels[0].legend(frameon=False)
    if speed:
        panels[1].plot(*_select(rows, speed), color=_GREEN, linewidth=1)
        panels[1].set_ylabel(speeds[speed])
        panels[1].set_ylim(bottom=0)
        panels[1].yaxis.set_major_formatter("{x:,g}")
    panels[-1].set_xlabel("optimiser step")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        for step in switch_steps.values():
            panel.axvline(step, color=_GREY, linestyle="--", linewidth=1)
    for number, (phase, step) in enumerate(switch_steps.items()):
        panels[0].annotate(
            f"{phase} from step {step}",
            (step, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4 + 14 * (number % 2)),
            textcoords="offset points",
            ha="center",
            color=_GREY,
        )
    figure.savefig(path)


def _select(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    selected = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in selected], [value for _, value in selected]
