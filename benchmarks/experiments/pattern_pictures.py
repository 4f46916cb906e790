"""Pictures of experiments on attention patterns: accuracy over density, and what is kept."""

import math
import pathlib
from collections.abc import Sequence

from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks.experiments.attention_patterns import MIDDLE, name_row, split_row, unpack_kept
from benchmarks.experiments.paired import describe_mean
from benchmarks.experiments.tables import Groups
from sparsejax.report.plots.style import BLUE, GREEN, ORANGE


def plot_accuracy(groups: Groups, path: pathlib.Path, *, chance: float) -> None:
    """Draw accuracy over density, a line for each pattern with the interval of 95 % of its mean.

    Args:
      groups: records by row.
      path: PNG file to write.
      chance: accuracy of guessing.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    swept = [named for row in groups if (named := split_row(row)) is not None]
    patterns = list(dict.fromkeys(pattern for pattern, _ in swept))
    for index, pattern in enumerate(patterns):
        # Beside each other, so that equal values do not hide each other.
        shift = 0.0025 * (index - len(patterns) / 2)
        points = []
        for density in sorted({density for name, density in swept if name == pattern}):
            records = groups[name_row(pattern, density)]
            values = [record["values"]["summary"]["validation_accuracy"] for record in records]
            points.append((density + shift, *describe_mean(values)))
        x, mean, half_width = zip(*points, strict=True)
        line = axes.errorbar(x, mean, half_width, marker="o", ms=4, capsize=3, label=pattern)
        line.lines[0].set_linestyle("-" if index < 10 else "--")
    axes.axhline(chance, color="grey", lw=0.8, ls=":", label="chance")
    axes.set(xlabel="share of the blocks that are kept", ylabel="accuracy", ylim=(0, 1.04))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def draw_kept(
    groups: Groups, path: pathlib.Path, *, needed: Sequence[tuple[int, int]] = ()
) -> None:
    """Draw which blocks each pattern keeps in the first seed at the middle density.

    Args:
      groups: records by row.
      path: PNG file to write, a panel for each layer; none if nothing is recorded.
      needed: rows and columns of the blocks that the task needs, framed.
    """
    kept = {}
    for row, records in groups.items():
        named, bits = split_row(row), records[0]["values"]["summary"].get("kept")
        if bits and named and named[1] == MIDDLE:
            kept[named[0]] = unpack_kept(bits)
    if not kept:
        return
    panels = [(name, layer) for name, layers in kept.items() for layer in range(len(layers))]
    num_layers = len(panels) // len(kept)
    columns = math.ceil(len(kept) / 2) * num_layers
    figure = Figure(figsize=(2.1 * columns, 4.9), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False).ravel()
    for each in axes:
        each.axis("off")
    for each, (name, layer) in zip(axes, panels, strict=False):
        blocks = kept[name][layer]
        title = name if num_layers == 1 else f"{name}, layer {layer}"
        if needed:
            title += f"\n{sum(blocks[place] for place in needed)} of {len(needed)} needed"
        each.imshow(blocks, cmap=ListedColormap(["#F2F2F2", BLUE]), vmin=0, vmax=1)
        each.set_title(title, fontsize=9)
        for row, column in needed:
            color = GREEN if blocks[row, column] else ORANGE
            corner = (column - 0.5, row - 0.5)
            each.add_patch(Rectangle(corner, 1, 1, fill=False, ec=color, lw=1.6))
    figure.savefig(path, dpi=150)
