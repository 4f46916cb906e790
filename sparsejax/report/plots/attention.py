"""Draw the attention pattern of each layer.

Axis letters: L layers, I query blocks, J key blocks.
"""

import math
import os
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.image import AxesImage
from matplotlib.patches import Patch

from sparsejax.report.plots.style import BLUE, GREY, make_figure, save_figure

_PRUNED, _INVISIBLE = "#F2F2F2", "#C4C4C4"


def plot_attention_patterns(
    masks_LIJ: np.ndarray,
    pooled_LIJ: np.ndarray | None,
    *,
    path: str | os.PathLike,
    title: str,
    causal: bool = False,
    note: str = "",
) -> None:
    """Draw which attention blocks each layer keeps, beside the pooled attention if given.

    The density in each title is the fraction kept of the blocks that can be seen at all.

    Args:
      masks_LIJ: bool[L, I, J], True = kept.
      pooled_LIJ: float[L, I, J], attention averaged over each block, or None.
      path: PNG file to write.
      title: str above the picture.
      causal: bool, whether blocks wholly above the diagonal cannot be seen.
      note: str under the panels, in smaller letters.

    Raises:
      OSError: if the file cannot be written.
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
    height = 2.45 * grid_rows + 1.2 + 0.2 * len(note.splitlines())
    figure = make_figure(width, height, title=title)
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
    names = {"kept": BLUE, "pruned": _PRUNED} | ({"not visible": _INVISIBLE} if causal else {})
    figure.legend(
        handles=[Patch(facecolor=c, edgecolor=GREY, label=name) for name, c in names.items()],
        loc="outside lower center",
        ncols=len(names),
        frameon=False,
        title=note or None,
        title_fontsize="small",
    )
    save_figure(figure, path)


def _make_visible(rows_I: int, columns_J: int, causal: bool) -> np.ndarray:
    if not causal:
        return np.ones((rows_I, columns_J), bool)
    # Blocks may be oblong: a key block is seen if it starts before the query block ends.
    return np.arange(columns_J) * rows_I < np.arange(1, rows_I + 1)[:, None] * columns_J


def _draw_mask(panel: Axes, mask_IJ: np.ndarray, visible_IJ: np.ndarray) -> None:
    classes_IJ = np.where(visible_IJ, mask_IJ, 2)
    _draw(panel, classes_IJ, cmap=ListedColormap([_PRUNED, BLUE, _INVISIBLE]), vmin=0, vmax=2)
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


def _describe(array: np.ndarray) -> str:
    return f"{array.dtype}{list(array.shape)}"
