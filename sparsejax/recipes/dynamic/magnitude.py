"""Gradual magnitude pruning: a dense model loses its smallest weights while it trains."""

import dataclasses
from collections.abc import Mapping

from sparsejax.checks import prefix_errors
from sparsejax.masks import Ramp, SparsitySchedule, UpdateSteps
from sparsejax.masks.weights.densities import DensityMethod
from sparsejax.patterns import WeightPattern
from sparsejax.recipes.dynamic.engine import (
    Topology,
    check_patterns,
    fraction_to_steps,
    make_dynamic,
    sparse_phase,
)
from sparsejax.recipes.recipe import Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class MagnitudeConfig:
    """Settings of gradual magnitude pruning.

    Attributes:
      sparsity: float in [0, 1), fraction of the sparse weights removed in the end.
      start_fraction: float in [0, 1), pruning begins after this share of the run.
      end_fraction: float in (0, 1], and ends after this one.
      update_interval: int, steps from one pruning to the next.
      layer_density: "uniform" as published, "erdos_renyi" or "erk".
      rate_exponent: float in [0, 1], p: the learning rate of sparse weights is multiplied by
        density^-p. 0 as published; 1 as SuPar, arXiv:2405.15743, has it, with which the rate of
        dense training suits sparse weights too.
      num_steps: int, steps of the run.
      patterns: layer name -> Unstructured or WeightBlocks.

    Raises:
      ValueError: if a setting is out of range.
    """

    sparsity: float = 0.8
    start_fraction: float = 0.1
    end_fraction: float = 0.75
    update_interval: int = 100
    layer_density: DensityMethod = "uniform"
    rate_exponent: float = 0.0
    num_steps: int
    patterns: Mapping[str, WeightPattern]

    def __post_init__(self):
        with prefix_errors("recipe.magnitude"):
            check_patterns(self.patterns)
            self.make_topology()

    def make_topology(self) -> Topology:
        """Return what these settings mean.

        Returns:
          Topology.

        Raises:
          ValueError: if a setting is out of range.
        """
        if not 0 <= self.start_fraction < self.end_fraction:
            raise ValueError(
                "start_fraction must be at least 0 and below end_fraction, got "
                f"start_fraction={self.start_fraction}, end_fraction={self.end_fraction}"
            )
        start_step = round(self.start_fraction * self.num_steps)
        end_step = fraction_to_steps("end_fraction", self.end_fraction, self.num_steps)
        updates = UpdateSteps(
            interval=self.update_interval, start_step=max(start_step, 1), end_step=end_step
        )
        # The last update reaches the sparsity, wherever it falls.
        ramp = Ramp(
            start_step=start_step,
            end_step=updates.last_step,
            sparsity=self.sparsity,
            shape="cubic",
        )
        return Topology(
            sparsity=SparsitySchedule(num_steps=self.num_steps, ramps=(ramp,)),
            layer_density=self.layer_density,
            rate_exponent=self.rate_exponent,
            updates=updates,
        )


def make_magnitude(config: MagnitudeConfig) -> Recipe:
    """Return gradual magnitude pruning, which has the single phase "sparse".

    density(t) = d + (1 - d) (1 - x)^3, x from 0 to 1 between first and last pruning

    It comes after the optimizer's step and keeps the largest weights of those there are: unlike the
    published implementation, where a pruned weight keeps its value and may return.

    Args:
      config: MagnitudeConfig.

    Returns:
      Recipe, see `make_dynamic`.

    References:
      Zhu, Gupta, To prune, or not to prune, arXiv:1710.01878.
    """
    return make_dynamic(
        "magnitude", config.make_topology(), config.patterns, phases=(sparse_phase("sparse"),)
    )
