"""Draw a run of dynamic sparse training: sparsity, share replaced, loss and FLOPs by step."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

_PREFIX = "mask_density/"
_DPI = 150


def plot_topology(rows: Sequence[Mapping[str, Any]], *, path: str | os.PathLike) -> None:
    """Draw sparsity by weight, update fraction, losses, and FLOPs of a step against a dense one.

    Args:
      rows: lines of `read_metrics`; drawn are "mask_density" and "mask_density/NAME" (the mean over
        layers), "update_fraction", "loss", "validation_loss" and "step_flops". Rows of phases give
        their bounds and the FLOPs of a dense step.
      path: PNG file to write.

    Raises:
      ValueError: if no row has a mask density.
    """
    updates = [row for row in rows if "mask_density" in row]
    if not updates:
        raise ValueError("rows must contain 'mask_density'")
    steps = [row["step"] for row in updates]
    phases = [row for row in rows if row["kind"] == "phase"]
    train = [row for row in rows if row["kind"] == "train"]
    figure = Figure(figsize=(8, 9), dpi=_DPI, layout="constrained")
    sparsity, fraction, loss, flops = figure.subplots(4, 1, sharex=True)

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

    fraction.plot(steps, [row["update_fraction"] for row in updates], ".-", color="#0072B2")
    fraction.set_ylabel("fraction replaced")
    fraction.set_ylim(bottom=0)

    loss.plot(*_select(train, "loss"), color="#0072B2", linewidth=1, label="training")
    validation = [row for row in rows if row["kind"] == "validation"]
    loss.plot(
        *_select(validation, "validation_loss"), "o-", color="#D55E00", ms=4, label="validation"
    )
    loss.set_ylabel("loss (nats)")
    loss.legend(frameon=False)

    dense = phases[0]["dense_step_flops"]
    counted = [row for row in train if "step_flops" in row]
    flops.plot(
        [row["step"] for row in counted],
        [row["step_flops"] / dense for row in counted],
        color="#009E73",
        linewidth=1,
    )
    flops.set_ylabel("FLOPs / a dense step")
    flops.set_ylim(0, 1.05)
    flops.set_xlabel("optimiser step")

    for panel in (sparsity, fraction, loss, flops):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        for row in phases[1:]:
            panel.axvline(row["step"], color="#6E6E6E", linestyle="--", linewidth=1)
    for number, row in enumerate(phases):
        sparsity.annotate(
            row["phase"],
            (row["step"], 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3 + 11 * (number % 2)),
            textcoords="offset points",
            fontsize="small",
            color="#6E6E6E",
        )
    figure.savefig(path)


def _select(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    found = [row for row in rows if name in row]
    return [row["step"] for row in found], [row[name] for row in found]
