"""Masks as pure functions on arrays: True = kept."""

from pallas_kernels.transposable_mask import transposable_mask
from sparsejax.masks.attention.density import block_density
from sparsejax.masks.attention.dynamic import DynamicBlocks
from sparsejax.masks.attention.fixed import (
    FIXED_PATTERNS,
    bigbird,
    hybrid_blocks,
    hybrid_mask,
    longformer,
    pattern_at_density,
    sink_window,
    sliding_window,
)
from sparsejax.masks.attention.flood_fill import choose_walk, flood_fill, flood_reach
from sparsejax.masks.attention.sat import (
    count_kept_blocks,
    map_distance,
    map_skewness,
    model_pooled_map,
    sat_pattern,
)
from sparsejax.masks.attention.spion import pool_attention, spion_pattern, top_k_blocks
from sparsejax.masks.weights.counts import count_kept, update_counts
from sparsejax.masks.weights.decay import decay_in_backward, masked_decay
from sparsejax.masks.weights.densities import layer_densities, layer_densities_at
from sparsejax.masks.weights.flips import flip_rate, retained_l1, total_flip_rate
from sparsejax.masks.weights.magnitude import magnitude_nm_mask
from sparsejax.masks.weights.nm_topology import drop_and_grow_nm
from sparsejax.masks.weights.schedules import (
    AnnealingPhase,
    CosineAnnealing,
    Ramp,
    SparsitySchedule,
    UpdateSteps,
)
from sparsejax.masks.weights.selection import magnitude_mask, random_mask
from sparsejax.masks.weights.soft_threshold import (
    soft_threshold,
    soft_threshold_mask,
    soft_threshold_scale,
    soft_threshold_ste,
)
from sparsejax.masks.weights.topology import (
    apply_topology,
    block_scores,
    drop_and_grow,
    expand_blocks,
    expand_mask,
    reset_moments,
)

__all__ = [
    "FIXED_PATTERNS",
    "AnnealingPhase",
    "CosineAnnealing",
    "DynamicBlocks",
    "Ramp",
    "SparsitySchedule",
    "UpdateSteps",
    "apply_topology",
    "bigbird",
    "block_density",
    "block_scores",
    "choose_walk",
    "count_kept",
    "count_kept_blocks",
    "decay_in_backward",
    "drop_and_grow",
    "drop_and_grow_nm",
    "expand_blocks",
    "expand_mask",
    "flip_rate",
    "flood_fill",
    "flood_reach",
    "hybrid_blocks",
    "hybrid_mask",
    "layer_densities",
    "layer_densities_at",
    "longformer",
    "magnitude_mask",
    "magnitude_nm_mask",
    "map_distance",
    "map_skewness",
    "masked_decay",
    "model_pooled_map",
    "pattern_at_density",
    "pool_attention",
    "random_mask",
    "reset_moments",
    "retained_l1",
    "sat_pattern",
    "sink_window",
    "sliding_window",
    "soft_threshold",
    "soft_threshold_mask",
    "soft_threshold_scale",
    "soft_threshold_ste",
    "spion_pattern",
    "top_k_blocks",
    "total_flip_rate",
    "transposable_mask",
    "update_counts",
]
