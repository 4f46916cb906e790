"""The protocol between a sparse-training method and the train step and loop.

A recipe is a NamedTuple of pure functions on pytrees, like an Optax transformation. Training runs
through its phases in order. A phase is static, so each one compiles its own step. Every function
has a default that does nothing (below), so a method states only what it does:

  inside every step        choose_masks, transform_params -> forward -> auxiliary_loss ->
                           mask_gradients -> clip -> transform_gradients -> skip_optimizer ->
                           optimizer -> transform_updates -> update -> metrics
  in a step that probes    observe, before transform_gradients; it may ask for the next phase
  between two phases       enter_phase

A recipe also owns its reports: what a step means for the ledger of FLOPs (account), the metrics in
progress lines (progress_metrics), what is worth saying of a phase as it begins (phase_metrics,
phase_warnings), and the pictures of a phase and of a run (draw_phase, draw_run).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax.patterns import HeadMaps
from sparsejax.recipes import hooks
from sparsejax.recipes.phases import Measured as Measured
from sparsejax.recipes.phases import Metric as Metric
from sparsejax.recipes.phases import Observation as Observation
from sparsejax.recipes.phases import Phase as Phase
from sparsejax.recipes.phases import Sparsity as Sparsity
from sparsejax.recipes.phases import StepAccount as StepAccount
from sparsejax.recipes.phases import keep_where as keep_where
from sparsejax.types import PyTree


def _keep_masks(masks: PyTree, params: PyTree, key: jax.Array, /) -> Sparsity:
    del params, key
    return Sparsity(masks=masks, params={}, statistics={}, phase_start_step=jnp.int32(0))


def _choose_kept_masks(sparsity: Sparsity, /, *, step: jax.Array, phase: Phase) -> PyTree:
    del step, phase
    return sparsity.masks


def _keep_first(first: PyTree, /, *rest: Any) -> PyTree:
    del rest
    return first


def _add_no_loss(
    sparsity: Sparsity, attention_maps: jax.Array | HeadMaps | None, phase: Phase, /
) -> jax.Array:
    del sparsity, attention_maps, phase
    return jnp.float32(0)


def _skip_nothing(step: jax.Array, phase: Phase, /) -> jax.Array:
    del step, phase
    return jnp.bool_(False)


def _update_nothing(
    sparsity: Sparsity,
    params: PyTree,
    opt_state: PyTree,
    grads: PyTree,
    /,
    *,
    step: jax.Array,
    key: jax.Array,
    phase: Phase,
    learning_rate: jax.Array,
) -> tuple[Sparsity, PyTree, PyTree]:
    del grads, step, key, phase, learning_rate
    return sparsity, params, opt_state


def _measure_nothing(
    sparsity: Sparsity, /, *, step: jax.Array, phase: Phase
) -> Mapping[str, Metric]:
    del sparsity, step, phase
    return {}


def _observe_nothing(
    sparsity: Sparsity, attention_maps: jax.Array | HeadMaps, phase: Phase, /
) -> tuple[Sparsity, Observation]:
    del attention_maps, phase
    return sparsity, Observation(change_phase=jnp.bool_(False), metrics={})


def _enter_unchanged(sparsity: Sparsity, phase: Phase, /, *, previous: Phase) -> Sparsity:
    del phase, previous
    return sparsity


def _measure_no_phase(sparsity: Sparsity, phase: Phase, /) -> dict[str, jax.Array]:
    del sparsity, phase
    return {}


def _warn_of_nothing(values: Mapping[str, Any], /) -> Sequence[str]:
    del values
    return ()


def _account_for_nothing(values: Mapping[str, Any], /) -> StepAccount:
    del values
    return StepAccount()


def _draw_no_phase(sparsity: Sparsity, phase: Phase, /, *, step: int, folder: Path) -> None:
    del sparsity, phase, step, folder


def _draw_no_run(rows: Sequence[Mapping[str, Any]], /, *, folder: Path) -> None:
    del rows, folder


class Recipe(NamedTuple):
    """A sparse-training method as pure functions; the defaults train densely.

    Attributes:
      name: shown in progress lines, summaries and pictures.
      phases: in the order of training.
      progress_metrics: pairs (metric, label) for progress lines, which show the last value.
      parts: recipes that were chained (`chain`); () for a method by itself.

    All others are hooks; `sparsejax.recipes.hooks` says of each when it is called and with what.
    """

    name: str
    phases: tuple[Phase, ...]
    init: hooks.Init = _keep_masks
    choose_masks: hooks.ChooseMasks = _choose_kept_masks
    transform_params: hooks.TransformParams = _keep_first
    auxiliary_loss: hooks.AuxiliaryLoss = _add_no_loss
    mask_gradients: hooks.MaskGradients = _keep_first
    transform_gradients: hooks.TransformGradients = _keep_first
    skip_optimizer: hooks.SkipOptimizer = _skip_nothing
    transform_updates: hooks.TransformUpdates = _keep_first
    update: hooks.Update = _update_nothing
    metrics: hooks.Metrics = _measure_nothing
    observe: hooks.Observe = _observe_nothing
    enter_phase: hooks.EnterPhase = _enter_unchanged
    phase_metrics: hooks.PhaseMetrics = _measure_no_phase
    phase_warnings: hooks.PhaseWarnings = _warn_of_nothing
    account: hooks.Account = _account_for_nothing
    progress_metrics: tuple[tuple[str, str], ...] = ()
    draw_phase: hooks.DrawPhase = _draw_no_phase
    draw_run: hooks.DrawRun = _draw_no_run
    parts: tuple["Recipe", ...] = ()

    def find_next(self, phase: Phase, *, step: int, settled: bool) -> Phase | None:
        """Return the phase that follows after a step, None if the same goes on.

        Args:
          phase: of the step.
          step: steps done.
          settled: the step probed, and `observe` asked for the next phase.
        """
        if self.parts:
            parts = tuple(
                recipe.find_next(part, step=step, settled=settled) or part
                for recipe, part in zip(self.parts, phase.parts, strict=True)
            )
            if parts == phase.parts:
                return None
            return next(later for later in self.phases if later.parts == parts)
        expired = phase.last_step is not None and step >= phase.last_step
        asked = settled and phase.probe_every_steps is not None
        if phase == self.phases[-1] or not (expired or asked):
            return None
        return self.phases[self.phases.index(phase) + 1]
