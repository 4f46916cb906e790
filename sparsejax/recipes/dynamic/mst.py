"""MST: ramp the sparsity up, hold it, and ramp it down; grow by gradient and at random.

The warm-up prunes a dense model in stairs. The ultra-sparse phase is most of the run, with hybrid
sparse attention if configured. The restoration ends dense. Every update drops the smallest weights
and grows others, three of four by gradient and one at random.

Legend: L layers, I = J attention blocks along one side.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax.checks import check_used, prefix_errors
from sparsejax.masks import hybrid_blocks, hybrid_mask
from sparsejax.masks.weights.topology import Growth
from sparsejax.recipes.attention.layer_masks import (
    draw_attention_patterns,
    get_attention_masks,
    set_attention_masks,
)
from sparsejax.recipes.dynamic.engine import (
    MomentRule,
    TopologyConfig,
    make_dynamic,
    sparse_phase,
)
from sparsejax.recipes.dynamic.mst_schedules import MSTSchedules, mst_schedules
from sparsejax.recipes.dynamic.settings import RegrowthConfig, check_patterns
from sparsejax.recipes.recipe import Phase, Recipe, Sparsity


@dataclasses.dataclass(frozen=True, kw_only=True)
class MSTConfig(RegrowthConfig):
    """Settings of MST. The paper does not state its schedule; the default schedule is ours.

    Attributes:
      sparsity: fraction of the sparse weights removed in the ultra-sparse phase, in [0, 1).
      final_sparsity: fraction removed at the end, in [0, 1).
      warmup: share of the run for the warm-up.
      restoration: share of the run for the restoration.
      stairs: jumps of the warm-up; None climbs linearly.
      update_fraction: zeta in [0, 1], the fraction of the kept weights that an update at the start
        of a phase replaces; it falls to 0 along a cosine. The default is the released script's.
      update_interval_fraction: dT, share of the run from one update to the next, in (0, 1).
      growth: which weights grow: "mixed" as published, those with the largest "gradient", or
        "random" ones.
      mix: R, entries grown by gradient for each grown at random.
      layer_density: how the density is divided among weights, "erdos_renyi" (small weights are
        denser) as released, or "uniform".
      moments: the optimizer's moments of a grown weight: "stale" as released, left as they are;
        "zero"; or "mean", see `reset_moments`.
      keep_optimizer_step: take the optimizer's step before an update too. False as released: the
        update takes its place.
      attention_stride: l of hybrid sparse attention in the ultra-sparse phase, positions; None
        attends to everything. The released script's default for sparse attention is 128.
      attention_blocks: keep every block that holds a position of the pattern (ours), at the speed
        of block-sparse attention. False as released: keep the positions alone, by dense products,
        which saves counted FLOPs and no time.
      restore_attention: attend to everything in the restoration, an option of the released script.
        False keeps the pattern to the end and in the trained model.
      block_size: side of an attention block, positions.
      length: positions.
      causal: whether the model is a decoder.
    """

    sparsity: float = 0.9
    final_sparsity: float = 0.0
    warmup: float = 0.1
    restoration: float = 0.13
    stairs: int | None = 10
    growth: Growth = "mixed"
    mix: int = 3
    moments: MomentRule = "stale"
    keep_optimizer_step: bool = False
    attention_stride: int | None = None
    attention_blocks: bool = False
    restore_attention: bool = True
    block_size: int
    length: int
    causal: bool

    def __post_init__(self):
        check_used("recipe.mst", self, {"mix": ("growth", ("mixed",))})
        with prefix_errors("recipe.mst"):
            check_patterns(self.patterns)
            self.make_topology_config()
            stride, block = self.attention_stride, self.block_size
            if stride is not None and not 1 <= stride < self.length:
                raise ValueError(
                    "attention_stride must be positive and below the sequence length "
                    f"{self.length}, got attention_stride={stride}"
                )
            if stride is not None and self.attention_blocks and stride % block:
                raise ValueError(
                    f"attention_stride must be a multiple of the attention block, {block} "
                    f"positions, where whole blocks are kept, got attention_stride={stride}"
                )
            if self.attention_blocks and stride is None:
                raise ValueError("attention_blocks must be False without an attention_stride")
            if not self.restore_attention and stride is None:
                raise ValueError("restore_attention must be True without an attention_stride")

    def make_schedules(self) -> MSTSchedules:
        """Return the schedules of sparsity, update fraction and updates."""
        return mst_schedules(
            self.num_steps,
            sparsity=self.sparsity,
            final_sparsity=self.final_sparsity,
            warmup=self.warmup,
            restoration=self.restoration,
            stairs=self.stairs,
            update_fraction=self.update_fraction,
            update_interval_fraction=self.update_interval_fraction,
        )

    def make_topology_config(self) -> TopologyConfig:
        """Return how masks change."""
        schedules = self.make_schedules()
        return TopologyConfig(
            sparsity=schedules.sparsity,
            layer_density=self.layer_density,
            updates=schedules.updates,
            annealing=schedules.annealing,
            growth=self.growth,
            mix=self.mix,
            moments=self.moments,
            skips_optimizer=not self.keep_optimizer_step,
            rate_exponent=self.rate_exponent,
        )


@dataclasses.dataclass(frozen=True)
class HybridAttention:
    """The positions of hybrid sparse attention, as `Phase.position_mask`.

    Attributes:
      stride: l, positions.
      causal: whether positions after the query are dropped.

    Example:
      >>> int(HybridAttention(stride=128, causal=True)(1024).sum())
      126528
    """

    stride: int
    causal: bool

    def __call__(self, length: int) -> jax.Array:
        """Return `hybrid_mask` of a length T: bool[T, T], True = kept."""
        return hybrid_mask(length, stride=self.stride, causal=self.causal)


def make_mst(config: MSTConfig) -> Recipe:
    """Return MST with the phases "warm-up", "ultra-sparse" and "restoration".

    The schedules depend on the step alone; phases differ in attention only. Evaluation uses hybrid
    attention too, as in the released code, where settings name the steps with it. Of 1,024
    positions a stride of 128 keeps 24 % of the visible pairs; blocks of 64 that cover them
    (`attention_blocks`) keep 64 %.

    References:
      Hu, Li, Huang, Mixed Sparsity Training, arXiv:2408.11746. Where the paper is silent we follow
      the released code, which makes the embedding, tied to the head, sparse too.
    """
    start_step, end_step = config.make_schedules().sparse_attention
    attention: dict[str, Any] = {"sparse_attention": config.attention_stride is not None}
    if config.attention_stride is not None and not config.attention_blocks:
        attention["position_mask"] = HybridAttention(config.attention_stride, config.causal)
    recipe = make_dynamic(
        "mst",
        config.make_topology_config(),
        config.patterns,
        phases=(
            sparse_phase("warm-up", last_step=start_step),
            sparse_phase("ultra-sparse", last_step=end_step, **attention),
            sparse_phase("restoration", **({} if config.restore_attention else attention)),
        ),
    )
    return recipe._replace(
        enter_phase=functools.partial(_enter_phase, config),
        draw_phase=functools.partial(draw_attention_patterns, recipe.name, config.causal),
    )


def _enter_phase(
    config: MSTConfig, sparsity: Sparsity, phase: Phase, *, previous: Phase
) -> Sparsity:
    del previous
    stride = config.attention_stride
    if stride is None or not config.attention_blocks:
        return sparsity
    pattern_LIJ = jnp.ones_like(get_attention_masks(sparsity.masks))
    if phase.sparse_attention:
        pattern_LIJ &= hybrid_blocks(
            pattern_LIJ.shape[-1], block=config.block_size, stride=stride, causal=config.causal
        )
    return dataclasses.replace(sparsity, masks=set_attention_masks(sparsity.masks, pattern_LIJ))
