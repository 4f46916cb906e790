"""RigL: the smallest weights are dropped and those of the largest gradients grown."""

import dataclasses
from collections.abc import Mapping

from sparsejax.checks import prefix_errors
from sparsejax.masks import AnnealingPhase, CosineAnnealing, SparsitySchedule, UpdateSteps
from sparsejax.masks.weights.densities import DensityMethod
from sparsejax.patterns import WeightPattern
from sparsejax.recipes.dynamic.engine import (
    InitialMask,
    MomentRule,
    Topology,
    check_patterns,
    fraction_to_steps,
    make_dynamic,
    sparse_phase,
)
from sparsejax.recipes.recipe import Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class RigLConfig:
    """Settings of RigL; the defaults are the published ones where there are any.

    Attributes:
      sparsity: float in [0, 1), fraction of the sparse weights removed.
      update_fraction: float in [0, 1], zeta at the start; it falls to 0 along a cosine.
      update_interval: int, dT, steps from one update to the next.
      end_fraction: float in (0, 1], T_end as a share of the run.
      layer_density: "erdos_renyi", "erk" (the same, of matrices) or "uniform".
      initial_mask: "random" as published, or "magnitude".
      moments: "zero" as published, a grown weight inherits no momentum; "stale"; or "mean",
        see `reset_moments`.
      keep_optimizer_step: bool, take the optimizer's step at an update too, before it. False as
        published: the update takes its place.
      rate_exponent: float in [0, 1], p: the learning rate of sparse weights is multiplied by
        density^-p. 0 as published; 1 as SuPar, arXiv:2405.15743, has it, with which the rate of
        dense training suits sparse weights too.
      num_steps: int, steps of the run.
      patterns: layer name -> WeightPattern.

    Raises:
      ValueError: if a setting is out of range.
    """

    sparsity: float = 0.8
    update_fraction: float = 0.3
    update_interval: int = 100
    end_fraction: float = 0.75
    layer_density: DensityMethod = "erdos_renyi"
    initial_mask: InitialMask = "random"
    moments: MomentRule = "zero"
    keep_optimizer_step: bool = False
    rate_exponent: float = 0.0
    num_steps: int
    patterns: Mapping[str, WeightPattern]

    def __post_init__(self):
        with prefix_errors("recipe.rigl"):
            check_patterns(self.patterns, constant_sparsity=self.sparsity)
            self.make_topology()

    def make_topology(self) -> Topology:
        """Return what these settings mean.

        Returns:
          Topology.
        """
        end_step = fraction_to_steps("end_fraction", self.end_fraction, self.num_steps)
        annealing = AnnealingPhase(start_step=0, end_step=end_step, fraction=self.update_fraction)
        return Topology(
            sparsity=SparsitySchedule(num_steps=self.num_steps, initial_sparsity=self.sparsity),
            layer_density=self.layer_density,
            initial_mask=self.initial_mask,
            updates=UpdateSteps(interval=self.update_interval, end_step=end_step),
            annealing=CosineAnnealing(num_steps=self.num_steps, phases=(annealing,)),
            growth="gradient",
            moments=self.moments,
            skips_optimizer=not self.keep_optimizer_step,
            rate_exponent=self.rate_exponent,
        )


def make_rigl(config: RigLConfig) -> Recipe:
    """Return RigL, which has the single phase "sparse".

    Args:
      config: RigLConfig.

    Returns:
      Recipe, see `make_dynamic`. A weight dropped may grow again in the same update, as in MST.

    References:
      Evci, Gale, Menick, Castro, Elsen, Rigging the Lottery, arXiv:1911.11134.
    """
    return make_dynamic(
        "rigl", config.make_topology(), config.patterns, phases=(sparse_phase("sparse"),)
    )
