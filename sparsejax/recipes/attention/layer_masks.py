"""The attention masks of a stacked model: written, read, measured and drawn.

Legend: L layers, I query blocks, J key blocks.
"""

from pathlib import Path
from typing import Any

import jax

from sparsejax.checks import Check
from sparsejax.masks import block_density
from sparsejax.processes import fetch
from sparsejax.recipes.recipe import Phase, Sparsity
from sparsejax.types import PyTree


def set_attention_masks(masks: PyTree, pattern_LIJ: jax.Array) -> PyTree:
    """Replace every attention block mask of a stacked model by the layers' patterns.

    Args:
      masks: nested dict of bool arrays; leaves called `block_mask` are bool[L, 1, 1, I, J].
      pattern_LIJ: bool[L, I, J], True = kept.

    Returns:
      Nested dict like `masks`.

    Raises:
      ValueError: if the pattern does not fit a block mask.
    """

    def replace(path, mask):
        if path[-1].key != "block_mask":
            return mask
        pattern = pattern_LIJ[:, None, None]
        if pattern.shape != mask.shape:
            raise ValueError(
                f"the pattern must have the shape of {jax.tree_util.keystr(path)}, got "
                f"{pattern_LIJ.shape=} for {mask.shape=}"
            )
        return pattern

    return jax.tree_util.tree_map_with_path(replace, masks)


def get_attention_masks(masks: PyTree) -> jax.Array:
    """Return the attention block masks of a stacked model, one per layer.

    Args:
      masks: nested dict of bool arrays with one leaf called `block_mask`, bool[L, 1, 1, I, J].

    Returns:
      bool[L, I, J], True = kept.

    Raises:
      ValueError: if there is not exactly one such leaf.
    """
    found = [
        mask
        for path, mask in jax.tree_util.tree_leaves_with_path(masks)
        if path[-1].key == "block_mask"
    ]
    if len(found) != 1:
        raise ValueError(f"masks must have one leaf called 'block_mask', got {len(found)}")
    return found[0][:, 0, 0]


def compute_attention_density(masks: PyTree, *, causal: bool) -> jax.Array:
    """Return the fraction of visible blocks that each layer keeps.

    Args:
      masks: nested dict of bool arrays with one leaf called `block_mask`, bool[L, 1, 1, I, J].
      causal: whether only blocks on and below the diagonal are visible.

    Returns:
      f32[L].
    """
    return block_density(get_attention_masks(masks), causal=causal)


def draw_attention_patterns(
    name: str,
    causal: bool,
    sparsity: Sparsity,
    phase: Phase,
    *,
    step: int,
    folder: Path,
    note: str = "",
) -> None:
    """Draw the blocks that each layer keeps in a phase of sparse attention, as `Recipe.draw_phase`.

    The pooled attention maps are drawn beside them if the recipe keeps those as the statistic
    "pooled", f32[L, I, J].

    Args:
      name: of the recipe, for the title.
      causal: whether only blocks on and below the diagonal are visible.
      sparsity: of the train state.
      phase: the phase that begins.
      step: steps done.
      folder: where `attention_patterns.png` is written; nothing is, if attention is dense.
      note: what the title does not say of how blocks are chosen.
    """
    if not phase.sparse_attention:
        return
    from sparsejax.report.plots.attention import plot_attention_patterns

    pooled_LIJ = sparsity.statistics.get("pooled")
    plot_attention_patterns(
        *fetch((get_attention_masks(sparsity.masks), pooled_LIJ)),
        path=folder / "attention_patterns.png",
        causal=causal,
        title=f"{name}: attention blocks from step {step}",
        note=note,
    )


def check_attention_sizes(check: Check, settings: Any) -> None:
    """Refuse sizes that are not positive, and blocks that do not divide the sequence.

    Args:
      check: that of the recipe.
      settings: object with num_layers, length and block_size.

    Raises:
      ValueError: with the setting's name.
    """
    for name in ("num_layers", "length", "block_size"):
        check(getattr(settings, name) > 0, name, "positive")
    fits = settings.length % settings.block_size == 0
    check(fits, "block_size", f"a divisor of the sequence length {settings.length}")
