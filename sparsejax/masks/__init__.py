"""Masks as pure functions on arrays: True = kept."""

from sparsejax.masks.block_patterns import (
    bigbird,
    longformer,
    pattern_at_density,
    sliding_window,
)
from sparsejax.masks.flood_fill import flood_fill, pool_attention, spion_pattern, top_k_blocks
from sparsejax.masks.metrics import block_density

__all__ = [
    "bigbird",
    "block_density",
    "flood_fill",
    "longformer",
    "pattern_at_density",
    "pool_attention",
    "sliding_window",
    "spion_pattern",
    "top_k_blocks",
]
