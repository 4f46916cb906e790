"""Settings shared by the methods that prune weights while training, and their checks."""

import dataclasses
from collections.abc import Mapping

from sparsejax.masks import SparsitySchedule
from sparsejax.masks.weights.densities import DensityMethod
from sparsejax.patterns import NMPattern, WeightPattern
from sparsejax.recipes.dynamic.engine import InitialMask, MomentRule


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicConfig:
    """Settings of every method on the engine of dynamic sparse training.

    Attributes:
      sparsity: fraction of the sparse weights removed, in [0, 1).
      layer_density: how the density is divided among weights, "erdos_renyi" (small weights are
        denser) or "uniform".
      rate_exponent: p in [0, 1]. The learning rate of sparse weights is multiplied by density^-p:
        0 as published; 1 as SuPar, arXiv:2405.15743, so that the rate of dense training suits
        sparse weights too.
      num_steps: steps of the run.
      patterns: layer name -> pattern of its weight.

    Raises:
      ValueError: if a setting is out of range.
    """

    sparsity: float = 0.8
    layer_density: DensityMethod = "erdos_renyi"
    rate_exponent: float = 0.0
    num_steps: int
    patterns: Mapping[str, WeightPattern]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstantSparsityConfig(DynamicConfig):
    """Settings of methods that are equally sparse from the first step to the last.

    Attributes:
      initial_mask: what the masks keep of the initial weights, "random" entries as published, or
        the largest, "magnitude".
    """

    initial_mask: InitialMask = "random"

    def make_sparsity_schedule(self) -> SparsitySchedule:
        """Return the schedule that stays at the sparsity."""
        return SparsitySchedule(num_steps=self.num_steps, initial_sparsity=self.sparsity)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegrowthConfig(DynamicConfig):
    """Settings of methods that replace weights: each update drops some and grows others.

    Attributes:
      update_fraction: zeta in [0, 1], the fraction of the kept weights that an update replaces.
      update_interval: dT, steps from one update to the next.
      moments: the optimizer's moments of a grown weight: "zero"; "stale", left as they are; or
        "mean", see `reset_moments`.
    """

    update_fraction: float = 0.3
    update_interval: int = 100
    moments: MomentRule = "zero"


def fraction_to_steps(name: str, fraction: float, num_steps: int) -> int:
    """Turn a fraction of a run into steps.

    Args:
      name: what the message calls the fraction.
      fraction: in (0, 1].
      num_steps: steps of the run.

    Raises:
      ValueError: if the fraction is out of range.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {name}={fraction}")
    return round(fraction * num_steps)


def check_patterns(
    patterns: Mapping[str, WeightPattern], *, constant_sparsity: float | None = None
) -> None:
    """Refuse patterns that a method cannot follow.

    Args:
      patterns: layer name -> pattern of its weight.
      constant_sparsity: sparsity of the whole run; None if it changes.

    Raises:
      ValueError: if there is no weight, or an n:m pattern that is transposable, differs from the
        pattern of another weight, or has another sparsity than the run.
    """
    shown = {name: str(pattern) for name, pattern in patterns.items()}
    if not patterns:
        raise ValueError(f"sparse_weights must name at least one weight, got {shown}")
    groups = {p for p in patterns.values() if isinstance(p, NMPattern)}
    if not groups:
        return
    if constant_sparsity is None:
        raise ValueError(
            "sparse_weights must be 'unstructured' or blocks such as '64x64' where the sparsity "
            f"changes while training, got {shown}"
        )
    if len({*patterns.values()}) > 1 or any(p.transposable for p in groups):
        raise ValueError(
            f"sparse_weights must be one n:m pattern, not transposable, or none of n:m, got {shown}"
        )
    (pattern,) = groups
    if constant_sparsity != 1 - pattern.n / pattern.m:
        raise ValueError(
            f"sparsity must be {1 - pattern.n / pattern.m:g}, that of the pattern '{pattern}', got "
            f"sparsity={constant_sparsity}"
        )
