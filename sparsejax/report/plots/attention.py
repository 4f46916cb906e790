"""Draw the attention pattern of each layer.

Axis letters: L layers, I query blocks, J key blocks.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch

from sparsejax.report.plots.style import BLUE, GREY, make_figure, measure_note, save_figure

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
    masks_LIJ, pooled_LIJ = read_maps(masks_LIJ, pooled_LIJ, "LIJ")
    layers = len(masks_LIJ)
    visible_IJ = make_visible(masks_LIJ.shape[1], masks_LIJ.shape[2], causal)
    panels_per_layer = 1 if pooled_LIJ is None else 2
    layers_per_row = min(layers, 4 if pooled_LIJ is None else 3 if layers > 4 else 2)
    grid_rows = math.ceil(layers / layers_per_row)
    note_width, note_height = measure_note(note)
    width = max(2.3 * panels_per_layer * layers_per_row + 0.6, 4.5, note_width)
    height = 2.45 * grid_rows + 1.2 + note_height
    figure = make_figure(width, height, title=title)
    grid = figure.subplots(grid_rows, panels_per_layer * layers_per_row, squeeze=False)
    panels_of_layer = grid.reshape(-1, panels_per_layer)
    for panel in panels_of_layer[layers:].flat:
        panel.set_axis_off()
    image = None
    for layer, panels in enumerate(panels_of_layer[:layers]):
        density = masks_LIJ[layer][visible_IJ].mean()
        draw_mask(panels[-1], masks_LIJ[layer], visible_IJ)
        panels[-1].set_title(f"kept, density {density:.2f}", fontsize="small")
        if pooled_LIJ is not None:
            image = draw_attention(panels[0], pooled_LIJ[layer], visible_IJ)
            panels[0].set_title("attention", fontsize="small")
        panels[0].set_title(f"layer {layer}: {panels[0].get_title()}", fontsize="small")
    for panel in grid[:, 0]:
        panel.set_ylabel("query block")
    for panel in panels_of_layer[layers - layers_per_row : layers].flat:
        panel.set_xlabel("key block")
    if image is not None:
        add_bar(image, list(grid.flat), aspect=15 * grid_rows)
    add_legend(figure, causal=causal, note=note)
    save_figure(figure, path)


def add_bar(image: AxesImage, panels: Sequence[Axes], *, aspect: float) -> None:
    """Explain the colours of attention beside panels.

    Args:
      image: what `draw_attention` returned.
      panels: of one figure.
      aspect: of the bar, its length to its width.
    """
    bar = panels[0].figure.colorbar(image, ax=panels, aspect=aspect)
    bar.set_label("attention / its 99th percentile", fontsize="small")
    bar.ax.tick_params(labelsize="x-small")


def add_legend(figure: Figure, *, causal: bool, note: str) -> None:
    """Explain the colours of masks below a picture.

    Args:
      figure: the picture.
      causal: bool, whether some blocks cannot be seen.
      note: str above the legend, in smaller letters.
    """
    names = {"kept": BLUE, "pruned": _PRUNED} | ({"not visible": _INVISIBLE} if causal else {})
    figure.legend(
        handles=[Patch(facecolor=c, edgecolor=GREY, label=name) for name, c in names.items()],
        loc="outside lower center",
        ncols=len(names),
        frameon=False,
        title=note or None,
        title_fontsize="small",
    )


def make_visible(rows_I: int, columns_J: int, causal: bool) -> np.ndarray:
    """Return which blocks can be seen at all.

    Args:
      rows_I: int, query blocks.
      columns_J: int, key blocks, whose sizes may be others.
      causal: bool, whether blocks wholly above the diagonal cannot.

    Returns:
      bool[I, J], True = visible.
    """
    if not causal:
        return np.ones((rows_I, columns_J), bool)
    # Blocks may be oblong: a key block is seen if it starts before the query block ends.
    return np.arange(columns_J) * rows_I < np.arange(1, rows_I + 1)[:, None] * columns_J


def draw_mask(
    panel: Axes, mask_IJ: np.ndarray, visible_IJ: np.ndarray, *, first_column: int = 0
) -> None:
    """Draw which blocks are kept.

    Args:
      panel: where.
      mask_IJ: bool[I, J], True = kept.
      visible_IJ: bool[I, J].
      first_column: where along x the first key block is.
    """
    classes_IJ = np.where(visible_IJ, mask_IJ, 2)
    colors = {"cmap": ListedColormap([_PRUNED, BLUE, _INVISIBLE]), "vmin": 0, "vmax": 2}
    _draw(panel, classes_IJ, first_column, **colors)


def draw_attention(
    panel: Axes, pooled_IJ: np.ndarray, visible_IJ: np.ndarray, *, first_column: int = 0
) -> AxesImage:
    """Draw how much attention blocks have, relative to the 99th percentile.

    Args:
      panel: where.
      pooled_IJ: float[I, J], attention averaged over each block.
      visible_IJ: bool[I, J].
      first_column: where along x the first key block is.
    """
    # Not the maximum: the first causal block sees one block only and dwarfs the others.
    bright = np.quantile(pooled_IJ[visible_IJ], 0.99) or 1
    relative_IJ = np.where(visible_IJ, pooled_IJ / bright, np.nan)
    colors = colormaps["viridis"].with_extremes(bad=_INVISIBLE)
    norm = PowerNorm(gamma=0.5, vmin=0, vmax=1, clip=True)
    return _draw(panel, relative_IJ, first_column, cmap=colors, norm=norm)


def _draw(panel: Axes, values_IJ: np.ndarray, first_column: int, **colors: Any) -> AxesImage:
    panel.tick_params(labelsize="x-small")
    panel.locator_params(integer=True, nbins=5)
    (rows_I, columns_J), left = values_IJ.shape, first_column - 0.5
    extent = (left, left + columns_J, rows_I - 0.5, -0.5)
    return panel.imshow(values_IJ, interpolation="nearest", extent=extent, **colors)


def read_maps(
    masks: np.ndarray, pooled: np.ndarray | None, axes: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Read masks and pooled attention, if they can be drawn together.

    Args:
      masks: bool, True = kept.
      pooled: float, of the same shape, or None.
      axes: letters of the axes, for messages.

    Returns:
      bool array and float array or None, of one shape.

    Raises:
      ValueError: if an array has another dtype or shape, or attention that is not finite.
    """
    masks = np.asarray(masks)
    if masks.dtype != bool or masks.ndim != len(axes) or not masks.size:
        expected = f"masks_{axes} must be bool[{', '.join(axes)}]"
        raise ValueError(f"{expected}, got {describe_array(masks)}")
    if pooled is not None:
        pooled = np.asarray(pooled)
        if pooled.shape != masks.shape or not np.isfinite(pooled).all():
            raise ValueError(
                f"pooled_{axes} must be finite and shaped like masks_{axes}, "
                f"{list(masks.shape)}, got {describe_array(pooled)}"
            )
    return masks, pooled


def describe_array(array: np.ndarray) -> str:
    """Return type and shape of an array, for a message.

    Args:
      array: what was refused.
    """
    return f"{array.dtype}{list(array.shape)}"
