"""MST: the sparsity climbs, rests where it is high, and falls back; what grows is mixed.

Warm-up makes the dense model sparse in stairs; the ultra-sparse phase trains most of the run,
with hybrid sparse attention if configured; the restoration ends dense. All the way, weights are
dropped by magnitude and grown, three of four by gradient and one at random.

Legend: L layers, I = J attention blocks along one side.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax.checks import prefix_errors
from sparsejax.masks import hybrid_blocks, hybrid_mask
from sparsejax.masks.weights.densities import DensityMethod
from sparsejax.masks.weights.topology import Growth
from sparsejax.patterns import WeightPattern
from sparsejax.recipes.attention.layer_masks import get_attention_masks, set_attention_masks
from sparsejax.recipes.dynamic.engine import (
    MomentRule,
    Topology,
    check_patterns,
    make_dynamic,
    sparse_phase,
)
from sparsejax.recipes.dynamic.mst_schedules import MSTSchedules, mst_schedules
from sparsejax.recipes.recipe import Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class MSTConfig:
    """Settings of MST. The paper's schedule is not known; that of the defaults is ours.

    Attributes:
      sparsity: float in [0, 1), fraction of the sparse weights removed in the ultra-sparse phase.
      final_sparsity: float in [0, 1), fraction removed at the end.
      warmup: float, share of the run for the warm-up.
      restoration: float, share of the run for the restoration.
      stairs: int or None, jumps of the warm-up; None climbs linearly.
      update_fraction: float in [0, 1], zeta at the start of each phase, as the released script.
      update_interval: int, dT, steps from one update to the next, as the released script.
      growth: "mixed" as published, "gradient" or "random".
      mix: int, R, entries grown by gradient for each grown at random.
      layer_density: "erdos_renyi" as released, "erk" or "uniform".
      moments: "stale" as released, Adam's moments of a grown weight are those of its former life;
        "zero"; or "mean", see `reset_moments`.
      keep_optimizer_step: bool, take the optimizer's step at an update too, before it. False as
        released: the update takes its place.
      rate_exponent: float in [0, 1], p: the learning rate of sparse weights is multiplied by
        density^-p. 0 as published; 1 as SuPar, arXiv:2405.15743, has it, with which the rate of
        dense training suits sparse weights too.
      attention_stride: int or None, l of hybrid sparse attention in the ultra-sparse phase, in
        positions; None attends to everything. The released script's default is 128, if attention is
        sparse at all.
      attention_blocks: bool, keep every block that holds a position of the pattern (ours), at the
        speed of block-sparse attention. False as released: the positions alone, by dense products
        whose saving is counted and not had.
      restore_attention: bool, attend to everything in the restoration, as the released script can.
        False keeps the pattern to the end and in the trained model.
      num_steps: int, steps of the run.
      patterns: layer name -> Unstructured or WeightBlocks.
      block_size: int, side of an attention block in positions.
      length: int, positions.
      causal: bool, a decoder.

    Raises:
      ValueError: if a setting is out of range.
    """

    sparsity: float = 0.9
    final_sparsity: float = 0.0
    warmup: float = 0.1
    restoration: float = 0.13
    stairs: int | None = 10
    update_fraction: float = 0.3
    update_interval: int = 100
    growth: Growth = "mixed"
    mix: int = 3
    layer_density: DensityMethod = "erdos_renyi"
    moments: MomentRule = "stale"
    keep_optimizer_step: bool = False
    rate_exponent: float = 0.0
    attention_stride: int | None = None
    attention_blocks: bool = False
    restore_attention: bool = True
    num_steps: int
    patterns: Mapping[str, WeightPattern]
    block_size: int
    length: int
    causal: bool

    def __post_init__(self):
        with prefix_errors("recipe.mst"):
            check_patterns(self.patterns)
            self.make_topology()
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
        """Return the schedules of sparsity, update fraction and updates.

        Returns:
          MSTSchedules.
        """
        return mst_schedules(
            self.num_steps,
            sparsity=self.sparsity,
            final_sparsity=self.final_sparsity,
            warmup=self.warmup,
            restoration=self.restoration,
            stairs=self.stairs,
            update_fraction=self.update_fraction,
            update_interval=self.update_interval,
        )

    def make_topology(self) -> Topology:
        """Return what these settings mean.

        Returns:
          Topology.
        """
        schedules = self.make_schedules()
        return Topology(
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
      stride: int, l.
      causal: bool.

    Example:
      >>> int(HybridAttention(stride=128, causal=True)(1024).sum())
      126528
    """

    stride: int
    causal: bool

    def __call__(self, length: int) -> jax.Array:
        """Return `hybrid_mask` of a length.

        Args:
          length: int, T.

        Returns:
          bool[T, T], True = kept.
        """
        return hybrid_mask(length, stride=self.stride, causal=self.causal)


def make_mst(config: MSTConfig) -> Recipe:
    """Return MST with the phases "warm-up", "ultra-sparse" and "restoration".

    The schedules are one function of the step; phases differ in attention only. Hybrid attention is
    used in evaluation too, as in the released code, where the steps with it are settings. Of 1,024
    positions a stride of 128 keeps 24 % of the visible pairs; blocks of 64 that cover them
    (`attention_blocks`) keep 64 %.

    Args:
      config: MSTConfig.

    Returns:
      Recipe, see `make_dynamic`.

    References:
      Hu, Li, Huang, Mixed Sparsity Training, arXiv:2408.11746. Where it is silent the released code
      is followed, which makes the embedding, tied to the head, sparse too.
    """
    start_step, end_step = config.make_schedules().sparse_attention
    stride = config.attention_stride
    attention: dict[str, Any] = {"sparse_attention": stride is not None}
    if stride is not None and not config.attention_blocks:
        attention["position_mask"] = HybridAttention(stride, config.causal)

    def enter_phase(sparsity, phase):
        pattern_LIJ = jnp.ones_like(get_attention_masks(sparsity.masks))
        if phase.sparse_attention and config.attention_blocks and stride is not None:
            pattern_LIJ &= hybrid_blocks(
                pattern_LIJ.shape[-1],
                block=config.block_size,
                stride=stride,
                causal=config.causal,
            )
        return dataclasses.replace(sparsity, masks=set_attention_masks(sparsity.masks, pattern_LIJ))

    return make_dynamic(
        "mst",
        config.make_topology(),
        config.patterns,
        phases=(
            sparse_phase("warm-up", last_step=start_step),
            sparse_phase("ultra-sparse", last_step=end_step, **attention),
            sparse_phase("restoration", **({} if config.restore_attention else attention)),
        ),
        enter_phase=enter_phase,
    )
