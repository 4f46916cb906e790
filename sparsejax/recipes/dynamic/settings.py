"""Settings shared by the methods that prune weights while training, and their checks."""

import dataclasses
from collections.abc import Mapping

from sparsejax.masks import SparsitySchedule, UpdateSteps
from sparsejax.masks.weights.densities import DensityMethod
from sparsejax.patterns import NMPattern, WeightPattern
from sparsejax.recipes.dynamic.engine import InitialMask, MomentRule
from sparsejax.shares import count_share


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
      update_interval_fraction: dT, share of the run from one update to the next, in (0, 1).
      moments: the optimizer's moments of a grown weight: "zero"; "stale", left as they are; or
        "mean", see `reset_moments`.
    """

    update_fraction: float = 0.3
    update_interval_fraction: float = 0.01
    moments: MomentRule = "zero"


def make_updates(
    interval_fraction: float,
    num_steps: int,
    *,
    start_fraction: float = 0.0,
    end_fraction: float = 1.0,
) -> UpdateSteps:
    """Return the steps that update masks.

    Args:
      interval_fraction: share of the run from one update to the next, in (0, 1).
      num_steps: steps of the run.
      start_fraction: no update in this share of the run, at its start; never at step 0.
      end_fraction: no update after this share of the run, in (0, 1].

    Raises:
      ValueError: if a share is out of range, or no update is left.
    """
    if not 0 < interval_fraction < 1:
        raise ValueError(f"update_interval_fraction must be in (0, 1), got {interval_fraction}")
    if not 0 <= start_fraction < end_fraction <= 1:
        raise ValueError(
            "end_fraction must be in (0, 1] and after the start of updates, at "
            f"{start_fraction}, got end_fraction={end_fraction}"
        )
    return UpdateSteps(
        interval=count_share(interval_fraction, num_steps),
        start_step=max(1, count_share(start_fraction, num_steps)),
        end_step=count_share(end_fraction, num_steps),
    )


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
