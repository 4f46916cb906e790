"""Static sparse training: masks that never change, the control of methods that change them."""

import dataclasses
from collections.abc import Mapping

from sparsejax.checks import prefix_errors
from sparsejax.masks import SparsitySchedule
from sparsejax.masks.weights.densities import DensityMethod
from sparsejax.patterns import WeightPattern
from sparsejax.recipes.dynamic.engine import (
    InitialMask,
    Topology,
    check_patterns,
    make_dynamic,
    sparse_phase,
)
from sparsejax.recipes.recipe import Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaticConfig:
    """Settings of static masks.

    Attributes:
      sparsity: float in [0, 1), fraction of the sparse weights removed.
      layer_density: "erdos_renyi", "erk" or "uniform", how a density is shared out among weights.
      initial_mask: "random" or "magnitude", what the masks keep of the initial weights.
      rate_exponent: float in [0, 1], p: the learning rate of sparse weights is multiplied by
        density^-p. 0 as published; 1 as SuPar, arXiv:2405.15743, has it, with which the rate of
        dense training suits sparse weights too.
      num_steps: int, steps of the run.
      patterns: layer name -> WeightPattern.

    Raises:
      ValueError: if a setting is out of range.
    """

    sparsity: float = 0.8
    layer_density: DensityMethod = "erdos_renyi"
    initial_mask: InitialMask = "random"
    rate_exponent: float = 0.0
    num_steps: int
    patterns: Mapping[str, WeightPattern]

    def __post_init__(self):
        with prefix_errors("recipe.static"):
            check_patterns(self.patterns, constant_sparsity=self.sparsity)
            self.make_topology()

    def make_topology(self) -> Topology:
        """Return what these settings mean.

        Returns:
          Topology.
        """
        return Topology(
            sparsity=SparsitySchedule(num_steps=self.num_steps, initial_sparsity=self.sparsity),
            layer_density=self.layer_density,
            initial_mask=self.initial_mask,
            rate_exponent=self.rate_exponent,
        )


def make_static(config: StaticConfig) -> Recipe:
    """Return training with fixed masks, which has the single phase "sparse".

    Args:
      config: StaticConfig.

    Returns:
      Recipe, see `make_dynamic`; without statistics.
    """
    return make_dynamic(
        "static", config.make_topology(), config.patterns, phases=(sparse_phase("sparse"),)
    )
