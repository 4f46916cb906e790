"""SET: every update drops the smallest weights and grows as many at random."""

import dataclasses

from sparsejax.checks import prefix_errors
from sparsejax.masks import AnnealingPhase, CosineAnnealing
from sparsejax.recipes.dynamic.engine import TopologyConfig, make_dynamic, sparse_phase
from sparsejax.recipes.dynamic.settings import (
    ConstantSparsityConfig,
    RegrowthConfig,
    check_patterns,
    make_updates,
)
from sparsejax.recipes.recipe import Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class SETConfig(RegrowthConfig, ConstantSparsityConfig):
    """Settings of SET.

    Attributes:
      update_interval_fraction: share of the run from one update to the next, in (0, 1);
        published: an epoch.
      end_fraction: updates end after this share of the run, in (0, 1].
      layer_density: how the density is divided among weights, "erdos_renyi" (small weights are
        denser) as published, or "uniform".
      moments: the optimizer's moments of a grown weight: "zero", "stale" or "mean", see
        `reset_moments`. SET was published with plain momentum and without a rule.
    """

    end_fraction: float = 1.0

    def __post_init__(self):
        with prefix_errors("recipe.set"):
            check_patterns(self.patterns, constant_sparsity=self.sparsity)
            self.make_topology_config()

    def make_topology_config(self) -> TopologyConfig:
        """Return how masks change: the fraction replaced is constant, without a cosine."""
        constant = AnnealingPhase(
            start_step=0, end_step=self.num_steps, fraction=self.update_fraction, coefficient=0.0
        )
        return TopologyConfig(
            sparsity=self.make_sparsity_schedule(),
            layer_density=self.layer_density,
            initial_mask=self.initial_mask,
            updates=make_updates(
                self.update_interval_fraction, self.num_steps, end_fraction=self.end_fraction
            ),
            annealing=CosineAnnealing(num_steps=self.num_steps, phases=(constant,)),
            growth="random",
            moments=self.moments,
            rate_exponent=self.rate_exponent,
        )


def make_set(config: SETConfig) -> Recipe:
    """Return SET, which has the single phase "sparse".

    An update follows the optimizer's step and needs no gradient of pruned weights. Grown weights
    start at 0, whereas the published SET draws them anew.

    References:
      Mocanu et al., Scalable training of artificial neural networks with adaptive sparse
      connectivity inspired by network science, arXiv:1707.04780.
    """
    topology = config.make_topology_config()
    return make_dynamic("set", topology, config.patterns, phases=(sparse_phase("sparse"),))
