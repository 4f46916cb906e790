"""SET: the smallest weights are dropped and as many grown at random, over and over."""

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
class SETConfig:
    """Settings of SET.

    Attributes:
      sparsity: float in [0, 1), fraction of the sparse weights removed.
      update_fraction: float in [0, 1], zeta, fraction of the kept weights replaced each time.
      update_interval: int, steps from one update to the next; published: an epoch.
      end_fraction: float in (0, 1], updates end after this share of the run.
      layer_density: "erdos_renyi" as published, "erk" or "uniform".
      initial_mask: "random" as published, or "magnitude".
      moments: "zero", "stale" or "mean", the optimizer's moments of a grown weight, see
        `reset_moments`; published with plain momentum and without a rule.
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
    end_fraction: float = 1.0
    layer_density: DensityMethod = "erdos_renyi"
    initial_mask: InitialMask = "random"
    moments: MomentRule = "zero"
    rate_exponent: float = 0.0
    num_steps: int
    patterns: Mapping[str, WeightPattern]

    def __post_init__(self):
        with prefix_errors("recipe.set"):
            check_patterns(self.patterns, constant_sparsity=self.sparsity)
            self.make_topology()

    def make_topology(self) -> Topology:
        """Return what these settings mean.

        Returns:
          Topology.
        """
        # Without a cosine: the fraction stays.
        constant = AnnealingPhase(
            start_step=0, end_step=self.num_steps, fraction=self.update_fraction, coefficient=0.0
        )
        return Topology(
            sparsity=SparsitySchedule(num_steps=self.num_steps, initial_sparsity=self.sparsity),
            layer_density=self.layer_density,
            initial_mask=self.initial_mask,
            updates=UpdateSteps(
                interval=self.update_interval,
                end_step=fraction_to_steps("end_fraction", self.end_fraction, self.num_steps),
            ),
            annealing=CosineAnnealing(num_steps=self.num_steps, phases=(constant,)),
            growth="random",
            moments=self.moments,
            rate_exponent=self.rate_exponent,
        )


def make_set(config: SETConfig) -> Recipe:
    """Return SET, which has the single phase "sparse".

    An update comes after the optimizer's step, and needs no gradient of pruned weights. Grown
    weights start at 0, where SET draws them anew.

    Args:
      config: SETConfig.

    Returns:
      Recipe, see `make_dynamic`.

    References:
      Mocanu et al., Scalable training of artificial neural networks with adaptive sparse
      connectivity inspired by network science, arXiv:1707.04780.
    """
    return make_dynamic(
        "set", config.make_topology(), config.patterns, phases=(sparse_phase("sparse"),)
    )
