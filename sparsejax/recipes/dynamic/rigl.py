"""RigL: every update drops the smallest weights and grows those with the largest gradients."""

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
class RigLConfig(RegrowthConfig, ConstantSparsityConfig):
    """Settings of RigL; the defaults are the published ones where there are any.

    Attributes:
      update_fraction: zeta in [0, 1], the fraction of the kept weights that the first update
        replaces; it falls to 0 along a cosine.
      end_fraction: T_end, updates end after this share of the run, in (0, 1].
      moments: the optimizer's moments of a grown weight: "zero" as published, "stale" or "mean",
        see `reset_moments`.
      keep_optimizer_step: take the optimizer's step before an update too. False as published: the
        update takes its place.
    """

    end_fraction: float = 0.75
    keep_optimizer_step: bool = False

    def __post_init__(self):
        with prefix_errors("recipe.rigl"):
            check_patterns(self.patterns, constant_sparsity=self.sparsity)
            self.make_topology_config()

    def make_topology_config(self) -> TopologyConfig:
        """Return how masks change: less and less, until T_end."""
        updates = make_updates(
            self.update_interval_fraction, self.num_steps, end_fraction=self.end_fraction
        )
        annealing = AnnealingPhase(
            start_step=0, end_step=updates.end_step, fraction=self.update_fraction
        )
        return TopologyConfig(
            sparsity=self.make_sparsity_schedule(),
            layer_density=self.layer_density,
            initial_mask=self.initial_mask,
            updates=updates,
            annealing=CosineAnnealing(num_steps=self.num_steps, phases=(annealing,)),
            growth="gradient",
            moments=self.moments,
            skips_optimizer=not self.keep_optimizer_step,
            rate_exponent=self.rate_exponent,
        )


def make_rigl(config: RigLConfig) -> Recipe:
    """Return RigL, which has the single phase "sparse".

    As in MST, an update may grow a weight that it has just dropped.

    References:
      Evci, Gale, Menick, Castro, Elsen, Rigging the Lottery, arXiv:1911.11134.
    """
    topology = config.make_topology_config()
    return make_dynamic("rigl", topology, config.patterns, phases=(sparse_phase("sparse"),))
