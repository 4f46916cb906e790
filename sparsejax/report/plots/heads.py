"""Draw the attention pattern of each head: strips of small grids for every layer.

Axis letters: L layers, N heads, I query blocks, J key blocks.
"""

import os
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from sparsejax.report.plots.attention import (
    add_bar,
    add_legend,
    draw_attention,
    draw_mask,
    make_visible,
    read_maps,
)
from sparsejax.report.plots.style import make_figure, measure_note, save_figure

_HEAD_INCHES = 1.25
_WIDEST_INCHES = 24.0


def plot_head_patterns(
    masks_LNIJ: np.ndarray,
    pooled_LNIJ: np.ndarray | None,
    *,
    path: str | os.PathLike,
    title: str,
    causal: bool = False,
    note: str = "",
) -> None:
    """Draw which attention blocks each head keeps, below the pooled attention if given.

    A layer has a strip of its heads, or two. The density below each head is the fraction kept of
    the blocks that can be seen at all.

    Args:
      masks_LNIJ: bool[L, N, I, J], True = kept.
      pooled_LNIJ: float[L, N, I, J], attention averaged over each block, or None.
      path: PNG file to write.
      title: str above the picture.
      causal: bool, whether blocks wholly above the diagonal cannot be seen.
      note: str under the strips, in smaller letters.

    Raises:
      OSError: if the file cannot be written.
      ValueError: if an array has another dtype or shape, or attention that is not finite.
    """
    masks_LNIJ, pooled_LNIJ = read_maps(masks_LNIJ, pooled_LNIJ, "LNIJ")
    layers, heads, rows_I, columns_J = masks_LNIJ.shape
    visible_IJ = make_visible(rows_I, columns_J, causal)
    strips_per_layer = 1 if pooled_LNIJ is None else 2
    inches = min(_HEAD_INCHES, _WIDEST_INCHES / heads)
    note_width, note_height = measure_note(note)
    width = max(inches * heads + 1.7, 4.5, note_width)
    height = layers * strips_per_layer * (inches * rows_I / columns_J + 0.5) + 1.2 + note_height
    figure = make_figure(width, height, title=title)
    strips = figure.subplots(layers * strips_per_layer, 1, squeeze=False)
    strips_of_layer = strips.reshape(layers, strips_per_layer)
    starts = [n * (columns_J + max(1, columns_J // 8)) for n in range(heads)]
    image = None
    for layer, panels in enumerate(strips_of_layer):
        densities = masks_LNIJ[layer, :, visible_IJ].mean(0)
        for n, start in enumerate(starts):
            draw_mask(panels[-1], masks_LNIJ[layer, n], visible_IJ, first_column=start)
            if pooled_LNIJ is not None:
                pooled_IJ = pooled_LNIJ[layer, n]
                image = draw_attention(panels[0], pooled_IJ, visible_IJ, first_column=start)
        _name_heads(panels[-1], starts, columns_J, [f"{density:.2f}" for density in densities])
        panels[-1].set_title("kept, with density", fontsize="small")
        if pooled_LNIJ is not None:
            _name_heads(panels[0], starts, columns_J, [f"head {n}" for n in range(heads)])
            panels[0].set_title("attention", fontsize="small")
        panels[0].set_title(f"layer {layer}: {panels[0].get_title()}", fontsize="small")
    if image is not None:
        add_bar(image, list(strips.flat), aspect=15 * layers)
    add_legend(figure, causal=causal, note=note)
    save_figure(figure, path)


def _name_heads(panel: Axes, starts: Sequence[int], columns_J: int, names: Sequence[str]) -> None:
    """Show all heads of a strip, each with a name below its middle and no frame around all."""
    panel.set_xlim(-0.5, starts[-1] + columns_J - 0.5)
    panel.set_xticks([start + (columns_J - 1) / 2 for start in starts], names)
    panel.tick_params(axis="x", length=0)
    panel.set_ylabel("query block", fontsize="x-small")
    for side in ("top", "right", "bottom", "left"):
        panel.spines[side].set_visible(False)
