"""Draw a run: its losses and speed over the steps."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from sparsejax.report.plots.style import (
    BLUE,
    GREEN,
    ORANGE,
    list_phases,
    make_figure,
    mark_phases,
    plot_smoothed,
    save_figure,
    select,
    tidy,
)


def plot_training(
    rows: Sequence[Mapping[str, Any]], *, path: str | os.PathLike, title: str
) -> None:
    """Draw the losses, and below them the speed, with the phases marked.

    Args:
      rows: lines of `read_metrics`; drawn are "loss", "validation_loss" and "tokens_per_second".
      path: PNG file to write.
      title: str above the picture.

    Raises:
      ValueError: if no row has a loss.
      OSError: if the file cannot be written.
    """
    train, validation = select(rows, "loss"), select(rows, "validation_loss")
    if not (train[0] or validation[0]):
        raise ValueError(f"rows must contain 'loss' or 'validation_loss', got {len(rows)} rows")
    speed, phases = select(rows, "tokens_per_second"), list_phases(rows)
    ratios = [2, 1] if speed[0] else [1]
    figure = make_figure(8, 3 * len(ratios) + 0.5, title=title)
    panels = list(
        figure.subplots(
            len(ratios), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios}
        )[:, 0]
    )
    if train[0]:
        plot_smoothed(panels[0], *train, phases=phases, color=BLUE, label="training")
    if validation[0]:
        panels[0].plot(*validation, "o-", color=ORANGE, markersize=4, label="validation")
    panels[0].set_ylabel("loss (nats)")
    panels[0].legend(frameon=False)
    if speed[0]:
        plot_smoothed(panels[1], *speed, phases=phases, color=GREEN, label="speed")
        panels[1].set_ylabel("tokens per second")
        panels[1].set_ylim(bottom=0)
        panels[1].yaxis.set_major_formatter("{x:,g}")
    panels[-1].set_xlabel("optimiser step")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    for panel in panels:
        tidy(panel)
    mark_phases(panels, phases)
    save_figure(figure, path)
