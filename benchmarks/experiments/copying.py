"""Which pattern finds the blocks that attention needs, where one knows which these are?

    make experiments NAME=hidden_permutation
    make experiments NAME=fixed_lag
    make experiments NAME=associative_recall

The second half of a sequence copies the first. In "hidden_permutation" its blocks are permuted by a
permutation that all sequences share and no pattern knows: eight blocks of 256, and the diagonal
that all patterns keep, are enough for an accuracy of 1; who sees no needed block guesses one of 16
symbols. Seed s trains with permutation s mod 3. "fixed_lag" copies without permutation, along one
diagonal. In "associative_recall" each sequence has a permutation of its own, told by the first
symbol of each block, so that no fixed pattern can do with few blocks.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks.experiments.attention_patterns import (
    MIDDLE,
    make_experiment,
    measure_kept,
    name_row,
    split_row,
    unpack_kept,
)
from benchmarks.experiments.paired import describe_mean
from sparsejax.data.copying import draw_permutation
from sparsejax.report.plots.style import BLUE, GREEN, ORANGE

DENSITIES = (0.1, 0.15, 0.2, 0.3, 0.5)
_SHORT = {"eval_every_steps": 200, "checkpoint__every_steps": 400, "log_every_steps": 100}


def _set_permutation(seed: int) -> dict[str, Any]:
    return {"data.copy_permutation": seed % 3}


def measure_blocks(workdir: pathlib.Path) -> dict[str, Any]:
    """Read which blocks a run kept in the end, and how many of those that a copy needs.

    Args:
      workdir: folder of a run of `copying:hidden_permutation` or `copying:fixed_lag`, of one layer.

    Returns:
      As `measure_kept`, and "needed_kept", the share of the needed blocks that any head keeps.
    """
    from sparsejax.checkpoint.workdir import read_run

    values = measure_kept(workdir)
    if "kept" not in values:
        return values
    data = read_run(workdir).config.data
    (kept_IJ,) = unpack_kept(values["kept"])
    num_needed = len(kept_IJ) // 2
    source_I = np.arange(num_needed)
    if data.source == "copying:hidden_permutation":
        source_I = draw_permutation(num_needed, data.copy_permutation)
    needed = kept_IJ[num_needed + np.arange(num_needed), source_I]
    return {"needed_kept": float(needed.mean()), **values}


def plot_accuracy(groups: Mapping[str, Sequence[Mapping[str, Any]]], path: pathlib.Path) -> None:
    """Draw accuracy over density, a line for each pattern with the interval of 95 % of its mean.

    Args:
      groups: records by row.
      path: PNG file to write.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    swept = [named for row in groups if (named := split_row(row)) is not None]
    patterns = dict.fromkeys(pattern for pattern, _ in swept)
    for index, pattern in enumerate(patterns):
        points = []
        for density in DENSITIES:
            if records := groups.get(name_row(pattern, density)):
                values = [r["values"]["summary"]["validation_accuracy"] for r in records]
                points.append((density, *describe_mean(values)))
        if not points:
            continue
        x, mean, half_width = zip(*points, strict=True)
        line = axes.errorbar(x, mean, half_width, marker="o", ms=4, capsize=3, label=pattern)
        line.lines[0].set_linestyle("-" if index < 10 else "--")
    axes.axhline(1 / 16, color="grey", lw=0.8, ls=":", label="chance")
    axes.set(xlabel="share of the blocks that are kept", ylabel="accuracy", ylim=(0, 1.04))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def draw_kept(groups: Mapping[str, Sequence[Mapping[str, Any]]], path: pathlib.Path) -> None:
    """Draw which blocks each pattern keeps in the first seed, and which of them are needed.

    Args:
      groups: records by row, of patterns at the middle density.
      path: PNG file to write.
    """
    kept = {}
    for row, records in groups.items():
        named, bits = split_row(row), records[0]["values"]["summary"].get("kept")
        if bits and named and named[1] == MIDDLE:
            (kept[named[0]],) = unpack_kept(bits)
    if not kept:
        return
    half = len(next(iter(kept.values()))) // 2
    needed = list(enumerate(draw_permutation(half, _set_permutation(0)["data.copy_permutation"])))
    columns = math.ceil(len(kept) / 2)
    figure = Figure(figsize=(2.1 * columns, 4.9), layout="constrained")
    panels = figure.subplots(2, columns, squeeze=False).ravel()
    for panel in panels:
        panel.axis("off")
    for panel, (pattern, blocks) in zip(panels, kept.items(), strict=False):
        found = sum(blocks[half + i, j] for i, j in needed)
        panel.imshow(blocks, cmap=ListedColormap(["#F2F2F2", BLUE]), vmin=0, vmax=1)
        panel.set_title(f"{pattern}\n{found} of {half} needed", fontsize=9)
        for i, j in needed:
            color = GREEN if blocks[half + i, j] else ORANGE
            corner = (j - 0.5, half + i - 0.5)
            panel.add_patch(Rectangle(corner, 1, 1, fill=False, ec=color, lw=1.6))
    figure.savefig(path, dpi=150)


def _report(groups: Mapping[str, Sequence[Mapping[str, Any]]], results_dir: pathlib.Path) -> str:
    plot_accuracy(groups, results_dir / "hidden_permutation_accuracy.png")
    draw_kept(groups, results_dir / "hidden_permutation_patterns.png")
    return ""


_COLUMNS = {
    "accuracy": "validation_accuracy",
    "validation loss": "validation_loss",
    "needed blocks kept": "needed_kept",
    "attention density": "sparse_attention_density",
    "sparse from step": "sparse_first_step",
    "of W untrained": "untrained_share",
}
HIDDEN_PERMUTATION = make_experiment(
    "hidden_permutation",
    "configs/copying.py:hidden_permutation",
    densities=DENSITIES,
    tuning_seeds=(100, 101),
    changes=_SHORT,
    columns=_COLUMNS,
    by_seed=_set_permutation,
    measure=measure_blocks,
    report=_report,
)
FIXED_LAG = make_experiment(
    "fixed_lag",
    "configs/copying.py:fixed_lag",
    changes=_SHORT,
    columns=_COLUMNS,
    measure=measure_blocks,
)
