"""Draw how fast the masks of weights change: in a run, and as the decay rate has it."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparsejax.report.plots.style import BLUE, GREEN, ORANGE, make_figure, save_figure, tidy

_PREFIX = "flip_rate/"


def plot_flip_rates(
    rows: Sequence[Mapping[str, Any]], *, path: str | os.PathLike, title: str
) -> None:
    """Draw the flip rate over the steps, and below it that of every layer as a heat map.

    Args:
      rows: lines of `read_metrics`; drawn are "flip_rate" and "flip_rate/NAME", a value for each
        layer.
      path: PNG file to write.
      title: str above the picture.

    Raises:
      ValueError: if no row has a flip rate.
      OSError: if the file cannot be written.
    """
    searches = [row for row in rows if "flip_rate" in row]
    if not searches:
        raise ValueError("rows must contain 'flip_rate'")
    names = sorted(name for name in searches[0] if name.startswith(_PREFIX))
    steps = [row["step"] for row in searches]
    # A search tells of the steps since the one before.
    first = 2 * steps[0] - steps[1] if len(steps) > 1 else steps[0] - 1
    figure = make_figure(8, 3.5 + 1.8 * len(names), title=title)
    ratios = [3] + [2] * len(names)
    panels = figure.subplots(len(ratios), 1, squeeze=False, gridspec_kw={"height_ratios": ratios})[
        :, 0
    ]
    panels[0].plot(steps, [row["flip_rate"] for row in searches], color=BLUE, linewidth=1)
    panels[0].set_ylabel("flip rate, all weights")
    panels[0].set_ylim(bottom=0)
    tidy(panels[0])
    highest = max((x for row in searches for name in names for x in row[name]), default=0) or 1
    image = None
    for name, panel in zip(names, panels[1:], strict=True):
        rates = np.array([row[name] for row in searches]).T
        extent = (first, steps[-1], len(rates) - 0.5, -0.5)
        image = panel.imshow(
            rates, aspect="auto", vmin=0, vmax=highest, extent=extent, interpolation="nearest"
        )
        panel.set_ylabel(f"layer of {name.removeprefix(_PREFIX)}")
        panel.locator_params(axis="y", integer=True)
    for panel in panels:
        panel.set_xlim(first, steps[-1])
        panel.locator_params(axis="x", integer=True)
    panels[-1].set_xlabel("optimiser step")
    if image is not None:
        figure.colorbar(image, ax=list(panels[1:]), label="share of a mask that changed")
    save_figure(figure, path)


def plot_decay_search(
    relative_rates: Mapping[float, float],
    *,
    accepted: tuple[float, float],
    chosen: float | None,
    path: str | os.PathLike,
) -> None:
    """Draw flip rates relative to a dense run over the decay rate.

    Args:
      relative_rates: decay rate -> flip rate / that of a dense run.
      accepted: (lowest, highest) that is accepted.
      chosen: float or None, the decay rate to mark.
      path: PNG file to write.

    Raises:
      ValueError: if there is nothing to draw.
      OSError: if the file cannot be written.
    """
    if not relative_rates:
        raise ValueError("relative_rates must not be empty")
    figure = make_figure(7, 4)
    panel = figure.subplots()
    panel.axhspan(*accepted, color=GREEN, alpha=0.15, label="accepted")
    panel.plot(*zip(*relative_rates.items(), strict=True), "o-", color=BLUE, linewidth=1)
    if chosen is not None:
        panel.plot([chosen], [relative_rates[chosen]], "o", color=ORANGE, label="chosen")
    panel.set_xscale("log")
    panel.set_ylim(bottom=0)
    panel.set_xlabel("decay rate")
    panel.set_ylabel("flip rate / that of a dense run")
    tidy(panel)
    panel.legend(frameon=False)
    save_figure(figure, path)
