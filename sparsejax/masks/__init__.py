"""Masks as pure functions on arrays: True = kept."""

from sparsejax.masks.block_patterns import (
    bigbird,
    longformer,
    pattern_at_density,
    sliding_window,
)
from sparsejax.masks.decay import masked_decay
from sparsejax.masks.flood_fill import flood_fill, pool_attention, spion_pattern, top_k_blocks
from sparsejax.masks.learned_pattern import (
    count_kept_blocks,
    map_distance,
    map_skewness,
    model_pooled_map,
    sat_pattern,
)
from sparsejax.masks.magnitude import magnitude_nm_mask
from sparsejax.masks.metrics import block_density, flip_rate, retained_l1, total_flip_rate
from sparsejax.masks.soft_threshold import (
    soft_threshold,
    soft_threshold_mask,
    soft_threshold_scale,
    soft_threshold_ste,
)
from sparsejax.masks.transposable import transposable_mask

__all__ = [
    "bigbird",
    "block_density",
    "count_kept_blocks",
    "flip_rate",
    "flood_fill",
    "longformer",
    "magnitude_nm_mask",
    "map_distance",
    "map_skewness",
    "masked_decay",
    "model_pooled_map",
    "pattern_at_density",
    "pool_attention",
    "retained_l1",
    "sat_pattern",
    "sliding_window",
    "soft_threshold",
    "soft_threshold_mask",
    "soft_threshold_scale",
    "soft_threshold_ste",
    "spion_pattern",
    "top_k_blocks",
    "total_flip_rate",
    "transposable_mask",
]
