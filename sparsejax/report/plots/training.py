"""Draw a run: its losses and speed over the steps, and the attention pattern of each layer.

Axis letters: L layers, I query blocks, J key blocks.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#6E6E6E"
_PRUNED, _INVISIBLE = "#F2F2F2", "#C4C4C4"
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


def plot_attention_patterns(
    masks_LIJ: np.ndarray,
    pooled_LIJ: np.ndarray | None,
    *,
    path: str | os.PathLike,
    title: str,
    causal: bool = False,
) -> None:
    """Draw which attention blocks each layer keeps, beside the pooled attention if given.

    The density in each title is the fraction kept of the blocks that can be seen at all.

    Args:
      masks_LIJ: bool[L, I, J], True = kept.
      pooled_LIJ: float[L, I, J], attention averaged over each block, or None.
      path: PNG file to write.
      title: str above the picture.
      causal: bool, whether blocks wholly above the diagonal cannot be seen.

    Raises:
      ValueError: if an array has another dtype or shape, or attention that is not finite.
    """
    masks_LIJ = np.asarray(masks_LIJ)
    if masks_LIJ.dtype != bool or masks_LIJ.ndim != 3 or not masks_LIJ.size:
        raise ValueError(f"masks_LIJ must be bool[L, I, J], got {_describe(masks_LIJ)}")
    if pooled_LIJ is not None:
        pooled_LIJ = np.asarray(pooled_LIJ)
        if pooled_LIJ.shape != masks_LIJ.shape or not np.isfinite(pooled_LIJ).all():
            raise ValueError(
                f"pooled_LIJ must be finite and shaped like masks_LIJ, {list(masks_LIJ.shape)}, "
                f"got {_describe(pooled_LIJ)}"
            )
    layers = len(masks_LIJ)
    visible_IJ = _make_visible(masks_LIJ.shape[1], masks_LIJ.shape[2], causal)
    panels_per_layer = 1 if pooled_LIJ is None else 2
    layers_per_row = min(layers, 4 if pooled_LIJ is None else 3 if layers > 4 else 2)
    grid_rows = math.ceil(layers / layers_per_row)
    width = max(2.3 * panels_per_layer * layers_per_row + 0.6, 4.5)
    figure = Figure(figsize=(width, 2.45 * grid_rows + 1.2), dpi=_DPI, layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(grid_rows, panels_per_layer * layers_per_row, squeeze=False)
    panels_of_layer = grid.reshape(-1, panels_per_layer)
    for panel in panels_of_layer[layers:].flat:
        panel.set_axis_off()
    image = None
    for layer, panels in enumerate(panels_of_layer[:layers]):
        _draw_mask(panels[-1], masks_LIJ[layer], visible_IJ)
        if pooled_LIJ is not None:
            image = _draw_attention(panels[0], pooled_LIJ[layer], visible_IJ)
        panels[0].set_title(f"layer {layer}: {panels[0].get_title()}", fontsize="small")
    for panel in grid[:, 0]:
        panel.set_ylabel("query block")
    for panel in panels_of_layer[layers - layers_per_row : layers].flat:
        panel.set_xlabel("key block")
    if image is not None:
        bar = figure.colorbar(image, ax=list(grid.flat), aspect=15 * grid_rows)
        bar.set_label("attention / its 99th percentile", fontsize="small")
        bar.ax.tick_params(labelsize="x-small")
    names = {"kept": _BLUE, "pruned": _PRUNED} | ({"not visible": _INVISIBLE} if causal else {})
    figure.legend(
        handles=[Patch(facecolor=c, edgecolor=_GREY, label=name) for name, c in names.items()],
        loc="outside lower center",
        ncols=len(names),
        frameon=False,
    )
    figure.savefig(path)


def _make_visible(rows_I: int, columns_J: int, causal: bool) -> np.ndarray:
    if not causal:
        return np.ones((rows_I, columns_J), bool)
    # Blocks may be oblong: a key block is seen if it starts before the query block ends.
    return np.arange(columns_J) * rows_I < np.arange(1, rows_I + 1)[:, None] * columns_J


def _draw_mask(panel: Axes, mask_IJ: np.ndarray, visible_IJ: np.ndarray) -> None:
    classes_IJ = np.where(visible_IJ, mask_IJ, 2)
    _draw(panel, classes_IJ, cmap=ListedColormap([_PRUNED, _BLUE, _INVISIBLE]), vmin=0, vmax=2)
    panel.set_title(f"kept, density {mask_IJ[visible_IJ].mean():.2f}", fontsize="small")


def _draw_attention(panel: Axes, pooled_IJ: np.ndarray, visible_IJ: np.ndarray) -> AxesImage:
    # Not the maximum: the first causal block sees one block only and dwarfs the others.
    bright = np.quantile(pooled_IJ[visible_IJ], 0.99) or 1
    relative_IJ = np.where(visible_IJ, pooled_IJ / bright, np.nan)
    panel.set_title("attention", fontsize="small")
    norm = PowerNorm(gamma=0.5, vmin=0, vmax=1, clip=True)
    return _draw(panel, relative_IJ, cmap="viridis", norm=norm)


def _draw(panel: Axes, values_IJ: np.ndarray, **colors: Any) -> AxesImage:
    panel.set_facecolor(_INVISIBLE)
    panel.tick_params(labelsize="x-small")
    panel.locator_params(integer=True, nbins=5)
    return panel.imshow(values_IJ, interpolation="nearest", **colors)


def _select(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    selected = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in selected], [value for _, value in selected]


def _describe(array: np.ndarray) -> str:
    return f"{array.dtype}{list(array.shape)}"
