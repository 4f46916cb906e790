"""Fixed attention patterns, known in advance: the baselines of learned ones.

Legend: L layers, I = J blocks along one side.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from sparsejax.checks import check_used, make_check
from sparsejax.masks import FIXED_PATTERNS, pattern_at_density
from sparsejax.recipes.attention.layer_masks import draw_attention_patterns, set_attention_masks
from sparsejax.recipes.recipe import Phase, Recipe, Sparsity
from sparsejax.shares import count_share


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaticAttentionConfig:
    """Settings of one fixed pattern for all layers.

    Attributes:
      pattern: "sliding_window", "sink_window" (a window and the first columns), "longformer",
        "bigbird", in block form, or "random": the diagonal and random blocks.
      density: fraction of the visible blocks kept, at least that of the diagonal. Every pattern
        keeps the same count, round(density * visible).
      num_sinks: columns of blocks that "sink_window" keeps whole; 1 is the block of the first
        positions.
      dense_fraction: share of the run with dense attention, before the pattern applies.
      pruned_logits: how pruned blocks count in the softmax, "masked" as in the published models, or
        "zero".
      causal: keep blocks on and below the diagonal only.
      num_layers: layers of the model.
      num_blocks: blocks along one side.
      num_steps: steps of the run.

    Raises:
      ValueError: if a setting is out of range.
    """

    pattern: str = "sliding_window"
    density: float = 0.1
    num_sinks: int = 1
    dense_fraction: float = 0.0
    pruned_logits: Literal["masked", "zero"] = "masked"
    causal: bool = False
    num_layers: int
    num_blocks: int
    num_steps: int

    def __post_init__(self):
        check = make_check("recipe.static_attention", self)
        patterns = tuple(FIXED_PATTERNS)
        check(self.pattern in patterns, "pattern", f"one of {patterns}")
        for name in ("num_layers", "num_blocks"):
            check(getattr(self, name) > 0, name, "positive")
        known = f"in 1 to {self.num_blocks}, the blocks along one side"
        check(1 <= self.num_sinks <= self.num_blocks, "num_sinks", known)
        check_used("recipe.static_attention", self, {"num_sinks": ("pattern", ("sink_window",))})
        diagonal = 2 / (self.num_blocks + 1) if self.causal else 1 / self.num_blocks
        expected = f"in [{diagonal:.4g}, 1], the diagonal being kept always"
        check(diagonal <= self.density <= 1, "density", expected)
        check(0 <= self.dense_fraction < 1, "dense_fraction", "in [0, 1)")
        leaves = f"small enough to leave a sparse step of {self.num_steps}"
        check(self.dense_steps < self.num_steps, "dense_fraction", leaves)
        check(self.pruned_logits in ("masked", "zero"), "pruned_logits", "'masked' or 'zero'")

    @property
    def dense_steps(self) -> int:
        """Steps of dense attention."""
        return count_share(self.dense_fraction, self.num_steps)


def make_static_attention(config: StaticAttentionConfig) -> Recipe:
    """Return the recipe that applies one fixed pattern.

    It has the phase "sparse", after a phase "dense" if `dense_fraction` is positive.

    References:
      Beltagy et al., Longformer, arXiv:2004.05150. Zaheer et al., Big Bird, arXiv:2007.14062. Xiao
      et al., attention sinks, arXiv:2309.17453, for inference.
    """

    def prune(sparsity: Sparsity, key: jax.Array) -> Sparsity:
        pattern = pattern_at_density(
            config.pattern,
            config.num_blocks,
            density=config.density,
            causal=config.causal,
            num_sinks=config.num_sinks,
            key=key,
        )
        patterns = jnp.broadcast_to(pattern, (config.num_layers, *pattern.shape))
        return dataclasses.replace(sparsity, masks=set_attention_masks(sparsity.masks, patterns))

    def init(masks, params, key):
        del params
        sparsity = Sparsity(
            masks=masks, params={}, statistics={"key": key}, phase_start_step=jnp.int32(0)
        )
        return sparsity if config.dense_steps else prune(sparsity, key)

    def enter_phase(sparsity, phase, *, previous):
        del phase, previous
        return prune(sparsity, sparsity.statistics["key"])

    dense = Phase("dense", last_step=config.dense_steps)
    sparse = Phase("sparse", sparse_attention=True, pruned_logits=config.pruned_logits)
    name = f"static-{config.pattern}"
    return Recipe(
        name=name,
        phases=(dense, sparse) if config.dense_steps else (sparse,),
        init=init,
        enter_phase=enter_phase,
        draw_phase=functools.partial(draw_attention_patterns, name, config.causal),
    )
