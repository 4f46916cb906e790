"""Draw a run of dynamic sparse training: sparsity, share replaced, loss and FLOPs by step."""

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

_PREFIX = "mask_density/"


def plot_topology(
    rows: Sequence[Mapping[str, Any]], *, path: str | os.PathLike, title: str
) -> None:
    """Draw sparsity by weight, update fraction, losses, and FLOPs of a step against a dense one.

    Args:
      rows: lines of `read_metrics`; drawn are "mask_density" and "mask_density/NAME" (the mean over
        layers), "update_fraction", "loss", "validation_loss" and "step_flops", the last as a share
        of the "dense_step_flops" of a phase's row.
      path: PNG file to write.
      title: str above the picture.

    Raises:
      ValueError: if no row has a mask density.
      OSError: if the file cannot be written.
    """
    updates = [row for row in rows if "mask_density" in row]
    if not updates:
        raise ValueError("rows must contain 'mask_density'")
    steps = [row["step"] for row in updates]
    train = [row for row in rows if row.get("kind") == "train"]
    figure = make_figure(8, 9.5, title=title)
    panels = figure.subplots(4, 1, sharex=True)
    sparsity, fraction, loss, flops = panels

    names = sorted(name for name in updates[0] if name.startswith(_PREFIX))
    for name in names:
        means = [1 - sum(row[name]) / len(row[name]) for row in updates]
        label = name.removeprefix(_PREFIX)
        sparsity.plot(steps, means, drawstyle="steps-post", linewidth=0.8, label=label)
    overall = [1 - row["mask_density"] for row in updates]
    sparsity.plot(steps, overall, color="black", drawstyle="steps-post", label="all of them")
    sparsity.set_ylabel("sparsity")
    sparsity.set_ylim(-0.02, 1)
    sparsity.legend(frameon=False, ncols=2, fontsize="small")

    fraction.plot(*select(updates, "update_fraction"), ".-", color=BLUE)
    fraction.set_ylabel("fraction replaced")
    fraction.set_ylim(bottom=0)

    phases = list_phases(rows)
    plot_smoothed(loss, *select(train, "loss"), phases=phases, color=BLUE, label="training")
    validation = select(rows, "validation_loss")
    loss.plot(*validation, "o-", color=ORANGE, ms=4, label="validation")
    loss.set_ylabel("loss (nats)")
    loss.legend(frameon=False)

    counted, spent = select(train, "step_flops")
    dense = next((row["dense_step_flops"] for row in rows if "dense_step_flops" in row), None)
    if dense is not None:
        flops.plot(counted, [x / dense for x in spent], color=GREEN, linewidth=1)
    flops.set_ylabel("FLOPs / a dense step")
    flops.set_ylim(0, 1.05)
    flops.set_xlabel("optimiser step")

    for panel in panels:
        tidy(panel)
    mark_phases(panels, phases)
    save_figure(figure, path)
