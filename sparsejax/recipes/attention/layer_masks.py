"""The attention masks of a stacked model: written, read, measured and drawn.

Legend: L layers, N query heads, I query blocks, J key blocks.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax.checks import Check
from sparsejax.masks import block_density
from sparsejax.patterns import HeadMaps
from sparsejax.processes import fetch
from sparsejax.recipes.recipe import Phase, Sparsity
from sparsejax.types import PyTree


def give_heads_masks(masks: PyTree, num_heads: int) -> PyTree:
    """Give each head an attention block mask of its own, still that of its layer.

    Args:
      masks: nested dict of bool arrays; leaves called `block_mask` are bool[L, 1, 1, I, J].
      num_heads: query heads N.

    Returns:
      Nested dict like `masks`, with block masks bool[L, 1, N, I, J].
    """

    def spread(path, mask):
        if path[-1].key != "block_mask":
            return mask
        return jnp.broadcast_to(mask, (*mask.shape[:2], num_heads, *mask.shape[3:]))

    return jax.tree_util.tree_map_with_path(spread, masks)


def set_attention_masks(masks: PyTree, pattern: jax.Array) -> PyTree:
    """Replace every attention block mask of a stacked model by the patterns of layers or heads.

    Args:
      masks: nested dict of bool arrays; leaves called `block_mask` are bool[L, 1, 1 | N, I, J].
      pattern: bool[L, I, J], or bool[L, N, I, J] of heads with masks of their own; True = kept.

    Returns:
      Nested dict like `masks`.

    Raises:
      ValueError: if the pattern does not fit a block mask.
    """

    def replace(path, mask):
        if path[-1].key != "block_mask":
            return mask
        new = pattern[:, None, None] if pattern.ndim == 3 else pattern[:, None]
        if new.shape != mask.shape:
            raise ValueError(
                f"the pattern must have the shape of {jax.tree_util.keystr(path)}, got "
                f"{pattern.shape=} for {mask.shape=}"
            )
        return new

    return jax.tree_util.tree_map_with_path(replace, masks)


def get_attention_masks(masks: PyTree) -> jax.Array:
    """Return the attention block masks of a stacked model, one per layer or per head.

    Args:
      masks: nested dict of bool arrays with one leaf called `block_mask`, bool[L, 1, 1 | N, I, J].

    Returns:
      bool[L, I, J], True = kept; bool[L, N, I, J] where heads have masks of their own.

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
    (mask,) = found
    return mask[:, 0] if mask.shape[2] > 1 else mask[:, 0, 0]


def compute_attention_density(masks: PyTree, *, causal: bool) -> jax.Array:
    """Return the fraction of visible blocks that each layer keeps, the mean of its heads.

    Args:
      masks: nested dict of bool arrays with one leaf called `block_mask`, bool[L, 1, 1 | N, I, J].
      causal: whether only blocks on and below the diagonal are visible.

    Returns:
      f32[L].
    """
    density = block_density(get_attention_masks(masks), causal=causal)
    return density.reshape(len(density), -1).mean(1)


def split_maps(
    maps: jax.Array | HeadMaps, pool: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Return the maps of layers, and what is pooled of them or, as they come, of each head.

    Args:
      maps: of a probe, f32[L, T, T] or HeadMaps.
      pool: f32[L, T, T] -> f32[L, I, J].

    Returns:
      f32[L, T, T], and f32[L, I, J] or f32[L, N, I, J].
    """
    return maps if isinstance(maps, HeadMaps) else (maps, pool(maps))


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
    """Draw the blocks that each layer or head keeps in a phase, as `Recipe.draw_phase`.

    The pooled attention maps are drawn beside them if the recipe keeps those as the statistic
    "pooled", f32[L, I, J], or f32[L, N, I, J] of heads.

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
    from sparsejax.report.plots.heads import plot_head_patterns

    masks = get_attention_masks(sparsity.masks)
    plot = plot_attention_patterns if masks.ndim == 3 else plot_head_patterns
    plot(
        *fetch((masks, sparsity.statistics.get("pooled"))),
        path=folder / "attention_patterns.png",
        causal=causal,
        title=f"{name}: attention blocks from step {step}",
        note=note,
    )


def check_heads(check: Check, settings: Any) -> None:
    """Refuse patterns of heads in a model of one.

    Args:
      check: that of the recipe.
      settings: object with num_heads and per_head.

    Raises:
      ValueError: with the setting's name.
    """
    check(settings.num_heads > 0, "num_heads", "positive")
    several = not settings.per_head or settings.num_heads > 1
    check(several, "per_head", "False in a model of one head")


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
