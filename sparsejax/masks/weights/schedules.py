"""Schedules of masks: when they are updated, how dense they are, how much of them is replaced.

A schedule is a frozen dataclass, checked when it is made, with functions of a traced step. A step
may be an array; steps count from 0, and a stretch of steps is half open: [start, end).

An update takes the density of its own step. Between updates a mask does not change.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ramp:
    """A stretch of steps in which the density moves from its present value to another.

    x = (step - start_step) / (end_step - start_step), with stairs floor(x stairs) / stairs
    linear: density = d0 + (d1 - d0) x
    cubic:  density = d1 + (d0 - d1) (1 - x)^3, fast at first, as gradual magnitude pruning

    Stairs are equally long; the first jump is at the end of the first stair, the last at the end of
    the ramp.

    Attributes:
      start_step: first step.
      end_step: from this step on the density is 1 - sparsity.
      sparsity: fraction removed at the end, in [0, 1); 1 - d1.
      shape: "linear" or "cubic".
      stairs: jumps of a staircase; None moves at every step.

    Raises:
      ValueError: if a setting is out of range.

    References:
      Zhu, Gupta: To prune, or not to prune, arXiv:1710.01878, the cubic form.
    """

    start_step: int
    end_step: int
    sparsity: float
    shape: Literal["linear", "cubic"] = "linear"
    stairs: int | None = None

    def __post_init__(self):
        _check_stretch("a ramp", self.start_step, self.end_step)
        _check_sparsity("sparsity", self.sparsity)
        if self.shape not in ("linear", "cubic"):
            raise ValueError(f"shape must be 'linear' or 'cubic', got shape={self.shape!r}")
        if self.stairs is not None:
            _check_int("stairs", self.stairs, at_least=1)
            if self.stairs > self.end_step - self.start_step:
                raise ValueError(
                    f"stairs must be at most the steps of the ramp, got stairs={self.stairs} from "
                    f"step {self.start_step} to {self.end_step}"
                )

    def density(self, step: jax.Array, start_density: float) -> jax.Array:
        """Return the density from the start of the ramp on.

        Args:
          step: i32[...], at least `start_step`.
          start_density: d0, the density before the ramp.

        Returns:
          f32[...]; exactly 1 - sparsity from the end on.
        """
        num_steps = self.end_step - self.start_step
        end_density = 1 - self.sparsity

        def interpolate(x):
            rest = (1 - x) ** (3 if self.shape == "cubic" else 1)
            return end_density + (start_density - end_density) * rest

        if self.stairs is None:
            x = (step - self.start_step).astype(jnp.float32) / num_steps
            return jnp.where(step < self.end_step, interpolate(x), end_density)
        # Stairs begin at integer steps, and their levels are computed in f64.
        index = np.arange(self.stairs + 1)
        begins = [
            self.start_step - (-num_steps * stair // self.stairs)
            for stair in range(1, self.stairs + 1)
        ]
        levels = interpolate(index / self.stairs)
        levels[-1] = end_density
        stair = jnp.searchsorted(jnp.array(begins), step, side="right")
        return jnp.array(levels, jnp.float32)[stair]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsitySchedule:
    """The sparsity of all sparse weights together, over a run.

    It starts at `initial_sparsity`, moves during each ramp and holds between them. SET and RigL
    have no ramps; gradual magnitude pruning has one cubic ramp; MST has a warm-up and a
    restoration, see `mst_schedules`.

    Attributes:
      num_steps: steps of the run.
      initial_sparsity: fraction removed at step 0, in [0, 1).
      ramps: in order and without overlap.

    Raises:
      ValueError: if a setting is out of range, or ramps overlap or reach beyond the run.

    References:
      Hu, Li, Huang, MST, arXiv:2408.11746: sparsity variation.

    Example:
      >>> pruning = Ramp(start_step=10, end_step=20, sparsity=0.8, shape="cubic")
      >>> schedule = SparsitySchedule(num_steps=100, ramps=(pruning,))
      >>> schedule.density(jnp.array([0, 10, 15, 20, 99]))
      Array([1. , 1. , 0.3, 0.2, 0.2], dtype=float32)
    """

    num_steps: int
    initial_sparsity: float = 0.0
    ramps: tuple[Ramp, ...] = ()

    def __post_init__(self):
        _check_int("num_steps", self.num_steps, at_least=1)
        _check_sparsity("initial_sparsity", self.initial_sparsity)
        _check_phases("ramps", self.ramps, self.num_steps)

    def density(self, step: jax.typing.ArrayLike) -> jax.Array:
        """Return the fraction of all sparse weights that is kept, 1 - sparsity.

        Args:
          step: i32[...].

        Returns:
          f32[...], like the step.
        """
        step, level = jnp.asarray(step), 1 - self.initial_sparsity
        density = jnp.full(step.shape, level, jnp.float32)
        for ramp in self.ramps:
            density = jnp.where(step < ramp.start_step, density, ramp.density(step, level))
            level = 1 - ramp.sparsity
        return density


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnealingPhase:
    """A stretch of steps in which the update fraction follows one cosine.

    zeta(t) = fraction / 2 (1 + cos(pi coefficient (t - start_step) / (end_step - start_step)))

    Attributes:
      start_step: first step.
      end_step: first step after the phase.
      fraction: zeta at the start, in [0, 1].
      coefficient: at least 0: 1 ends at zero, 0 is constant, above 1 zeta rises again.

    Raises:
      ValueError: if a setting is out of range.
    """

    start_step: int
    end_step: int
    fraction: float = 0.3
    coefficient: float = 1.0

    def __post_init__(self):
        _check_stretch("a phase", self.start_step, self.end_step)
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction must be in [0, 1], got fraction={self.fraction}")
        if not 0 <= self.coefficient < math.inf:
            raise ValueError(
                f"coefficient must be finite and not negative, got coefficient={self.coefficient}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineAnnealing:
    """The fraction of kept weights that an update replaces, annealed phase by phase.

    Attributes:
      num_steps: steps of the run.
      phases: in order and without overlap; outside of them nothing is replaced.

    Raises:
      ValueError: if `num_steps` is not positive, or phases overlap or reach beyond the run.

    References:
      Evci et al., RigL, arXiv:1911.11134, one phase; Hu, Li, Huang, MST, arXiv:2408.11746.

    Example:
      >>> annealing = CosineAnnealing(
      ...     num_steps=10, phases=(AnnealingPhase(start_step=0, end_step=8, fraction=0.5),)
      ... )
      >>> annealing.fraction(jnp.array([0, 4, 8])).round(2)
      Array([0.5 , 0.25, 0.  ], dtype=float32)
    """

    num_steps: int
    phases: tuple[AnnealingPhase, ...]

    def __post_init__(self):
        _check_int("num_steps", self.num_steps, at_least=1)
        _check_phases("phases", self.phases, self.num_steps)

    def fraction(self, step: jax.typing.ArrayLike) -> jax.Array:
        """Return zeta.

        Args:
          step: i32[...].

        Returns:
          f32[...] in [0, 1], like the step.
        """
        step = jnp.asarray(step)
        fraction = jnp.zeros(step.shape, jnp.float32)
        for phase in self.phases:
            num_steps = phase.end_step - phase.start_step
            x = (step - phase.start_step).astype(jnp.float32) / num_steps
            cosine = phase.fraction / 2 * (1 + jnp.cos(jnp.pi * phase.coefficient * x))
            inside = (phase.start_step <= step) & (step < phase.end_step)
            fraction = jnp.where(inside, cosine, fraction)
        return fraction


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateSteps:
    """The steps that update masks: multiples of an interval within a stretch.

    Attributes:
      interval: dT, steps from one update to the next.
      end_step: T_end, no update from this step on.
      start_step: no update before this step. The default skips step 0, when masks have just been
        made.

    Raises:
      ValueError: if a setting is out of range, or no update is left.

    Example:
      >>> UpdateSteps(interval=10, end_step=30).due(jnp.array([0, 5, 10, 20, 30]))
      Array([False, False,  True,  True, False], dtype=bool)
    """

    interval: int
    end_step: int
    start_step: int = 1

    def __post_init__(self):
        _check_int("interval", self.interval, at_least=1)
        _check_stretch("updates", self.start_step, self.end_step)
        if self.last_step < self.start_step:
            raise ValueError(
                f"there must be an update, got none every interval={self.interval} steps from "
                f"start_step={self.start_step} to before end_step={self.end_step}"
            )

    @property
    def last_step(self) -> int:
        """The step of the last update."""
        return (self.end_step - 1) // self.interval * self.interval

    def due(self, step: jax.typing.ArrayLike) -> jax.Array:
        """Return whether a step updates masks.

        Args:
          step: i32[...].

        Returns:
          bool[...], like the step.
        """
        step = jnp.asarray(step)
        inside = (self.start_step <= step) & (step < self.end_step)
        return inside & (step % self.interval == 0)


def _check_int(name: str, value: int, *, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name} must be an int of at least {at_least}, got {name}={value!r}")


def _check_stretch(what: str, start_step: int, end_step: int) -> None:
    _check_int("start_step", start_step, at_least=0)
    _check_int("end_step", end_step, at_least=0)
    if end_step <= start_step:
        raise ValueError(
            f"{what} must end after the start, got start_step={start_step}, end_step={end_step}"
        )


def _check_sparsity(name: str, sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"{name} must be in [0, 1), as 1 would empty every layer, got {name}={sparsity}"
        )


def _check_phases(name: str, phases, num_steps: int) -> None:
    previous_end = 0
    for phase in phases:
        stretch = f"[{phase.start_step}, {phase.end_step})"
        if phase.start_step < previous_end:
            raise ValueError(
                f"{name} must be in order and not overlap, got {stretch} after one that ends at "
                f"{previous_end}"
            )
        if phase.end_step > num_steps:
            raise ValueError(f"{name} must lie within the run of {num_steps}, got {stretch}")
        previous_end = phase.end_step
