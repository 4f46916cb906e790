"""Fixed masks of weights: the control of the methods that change theirs."""

import dataclasses

from sparsejax.checks import prefix_errors
from sparsejax.recipes.dynamic.engine import TopologyConfig, make_dynamic, sparse_phase
from sparsejax.recipes.dynamic.settings import ConstantSparsityConfig, check_patterns
from sparsejax.recipes.recipe import Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaticWeightsConfig(ConstantSparsityConfig):
    """Settings of fixed masks.

    Attributes:
      initial_mask: what the masks keep of the initial weights, "random" entries, or the largest,
        "magnitude".
    """

    def __post_init__(self):
        with prefix_errors("recipe.static_weights"):
            check_patterns(self.patterns, constant_sparsity=self.sparsity)
            self.make_topology_config()

    def make_topology_config(self) -> TopologyConfig:
        """Return how masks change: never."""
        return TopologyConfig(
            sparsity=self.make_sparsity_schedule(),
            layer_density=self.layer_density,
            initial_mask=self.initial_mask,
            rate_exponent=self.rate_exponent,
        )


def make_static_weights(config: StaticWeightsConfig) -> Recipe:
    """Return training with fixed masks, which has the single phase "sparse" and no statistics."""
    topology = config.make_topology_config()
    phases = (sparse_phase("sparse"),)
    return make_dynamic("static_weights", topology, config.patterns, phases=phases)
