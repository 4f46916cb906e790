"""Gradual magnitude pruning: a dense model loses its smallest weights as it trains."""

import dataclasses

from sparsejax.checks import prefix_errors
from sparsejax.masks import Ramp, SparsitySchedule
from sparsejax.masks.weights.densities import DensityMethod
from sparsejax.recipes.dynamic.engine import TopologyConfig, make_dynamic, sparse_phase
from sparsejax.recipes.dynamic.settings import DynamicConfig, check_patterns, make_updates
from sparsejax.recipes.recipe import Recipe
from sparsejax.shares import count_share


@dataclasses.dataclass(frozen=True, kw_only=True)
class MagnitudeConfig(DynamicConfig):
    """Settings of gradual magnitude pruning.

    Attributes:
      sparsity: fraction of the sparse weights removed in the end, in [0, 1).
      start_fraction: pruning begins after this share of the run, in [0, 1).
      end_fraction: pruning ends after this share of the run, in (0, 1].
      update_interval_fraction: share of the run from one pruning to the next, in (0, 1).
      layer_density: how the density is divided among weights, "uniform" as published, or
        "erdos_renyi" (small weights are denser).
    """

    start_fraction: float = 0.1
    end_fraction: float = 0.75
    update_interval_fraction: float = 0.01
    layer_density: DensityMethod = "uniform"

    def __post_init__(self):
        with prefix_errors("recipe.magnitude"):
            check_patterns(self.patterns)
            self.make_topology_config()

    def make_topology_config(self) -> TopologyConfig:
        """Return how masks change: they only lose entries.

        Raises:
          ValueError: if a setting is out of range.
        """
        if not 0 <= self.start_fraction < self.end_fraction:
            raise ValueError(
                "start_fraction must be at least 0 and below end_fraction, got "
                f"start_fraction={self.start_fraction}, end_fraction={self.end_fraction}"
            )
        updates = make_updates(
            self.update_interval_fraction,
            self.num_steps,
            start_fraction=self.start_fraction,
            end_fraction=self.end_fraction,
        )
        # The last update reaches the sparsity, wherever it falls.
        ramp = Ramp(
            start_step=count_share(self.start_fraction, self.num_steps),
            end_step=updates.last_step,
            sparsity=self.sparsity,
            shape="cubic",
        )
        return TopologyConfig(
            sparsity=SparsitySchedule(num_steps=self.num_steps, ramps=(ramp,)),
            layer_density=self.layer_density,
            rate_exponent=self.rate_exponent,
            updates=updates,
        )


def make_magnitude(config: MagnitudeConfig) -> Recipe:
    """Return gradual magnitude pruning, which has the single phase "sparse".

    density(t) = d + (1 - d) (1 - x)^3, x from 0 to 1 between the first and the last pruning

    A pruning follows the optimizer's step and keeps the largest of the weights that are left. In
    the published implementation a pruned weight keeps its value and may return; here it may not.

    References:
      Zhu, Gupta, To prune, or not to prune, arXiv:1710.01878.
    """
    topology = config.make_topology_config()
    return make_dynamic("magnitude", topology, config.patterns, phases=(sparse_phase("sparse"),))
